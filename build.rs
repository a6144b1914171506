//! Compiles `proto/` without `protoc`: protox parses, tonic-prost-build generates. Only for the daemon.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "daemon")]
    cri();
}

#[cfg(feature = "daemon")]
fn cri() {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/cri/runtime/v1/api.proto"], ["proto"]).expect("proto/cri/runtime/v1/api.proto is well formed");
    tonic_prost_build::configure().build_transport(false).compile_fds(files).expect("code for the CRI's services");
}
