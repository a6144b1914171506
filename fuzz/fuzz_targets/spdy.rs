#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| copepod::stream::hostile::spdy(bytes));
