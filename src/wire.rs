//! The encoding of plans and monitor messages: tagged, compact, and strict.
//!
//! A struct is a length and then fields, each a tag, a length and its bytes; a field that has its default value is left
//! out. A tag that the reader doesn't know is an error: a monitor older than the daemon refuses a plan that asks for
//! something it can't do, and never drops a security setting. An enum is a tag and its payload.
//!
//! Not a general serialisation format: no maps, no floats, no borrowing, and nothing but the four crates' processes ever
//! reads it. [`wire_struct!`](crate::wire_struct) and [`wire_enum!`](crate::wire_enum) write the code.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Why bytes could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// The bytes end inside a value, or a length points behind the end.
    #[error("message ends inside a value")]
    Truncated,
    /// A struct has a field that this version doesn't know.
    #[error("{of} has field {tag}, which this version does not know")]
    UnknownField {
        /// The struct.
        of: &'static str,
        /// The field's tag.
        tag: u32,
    },
    /// An enum has a variant that this version doesn't know.
    #[error("{of} has variant {tag}, which this version does not know")]
    UnknownVariant {
        /// The enum.
        of: &'static str,
        /// The variant's tag.
        tag: u32,
    },
    /// A field stands twice.
    #[error("{of} has field {tag} twice")]
    Repeated {
        /// The struct.
        of: &'static str,
        /// The field's tag.
        tag: u32,
    },
    /// A value is outside its type.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// A string is not UTF-8.
    #[error("text is not UTF-8")]
    Utf8,
    /// Bytes are left over after the value.
    #[error("{0} bytes are left after the value")]
    Trailing(usize),
}

/// A value that can be written and read.
pub trait Wire: Sized {
    /// Appends the value.
    fn put(&self, out: &mut Vec<u8>);
    /// Reads a value.
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError>;
}

/// The whole value as bytes.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.put(&mut out);
    out
}

/// Reads a value that fills `bytes` exactly.
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T, WireError> {
    let mut reader = Reader::new(bytes);
    let value = T::get(&mut reader)?;
    match reader.bytes.len() {
        0 => Ok(value),
        n => Err(WireError::Trailing(n)),
    }
}

/// What is left to read.
pub struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.bytes.split_at_checked(n).ok_or(WireError::Truncated)?;
        self.bytes = tail;
        Ok(head)
    }

    /// A length, checked against what is left: no allocation is larger than the message.
    pub fn length(&mut self) -> Result<usize, WireError> {
        let n = usize::try_from(u64::get(self)?).map_err(|_| WireError::Truncated)?;
        if n > self.bytes.len() { Err(WireError::Truncated) } else { Ok(n) }
    }

    /// A reader for the next value alone, which a length stands before.
    pub fn block(&mut self) -> Result<Reader<'a>, WireError> {
        let n = self.length()?;
        Ok(Reader::new(self.take(n)?))
    }
}

/// Appends a length and the bytes.
pub fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    (bytes.len() as u64).put(out);
    out.extend_from_slice(bytes);
}

/// Appends what `write` writes with its length before it.
pub fn put_block(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    write(&mut inner);
    put_bytes(&inner, out);
}

impl Wire for u64 {
    /// LEB128.
    fn put(&self, out: &mut Vec<u8>) {
        let mut n = *self;
        while n >= 0x80 {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = input.take(1)?[0];
            if shift == 63 && byte > 1 {
                return Err(WireError::Range("integer"));
            }
            n |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(WireError::Range("integer"))
    }
}

impl Wire for i64 {
    /// Zigzag.
    fn put(&self, out: &mut Vec<u8>) {
        (((self << 1) ^ (self >> 63)) as u64).put(out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let n = u64::get(input)?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }
}

macro_rules! narrow {
    ($($small:ty => $wide:ty, $name:literal);*) => {$(
        impl Wire for $small {
            fn put(&self, out: &mut Vec<u8>) {
                <$wide>::from(*self).put(out);
            }
            fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
                <$small>::try_from(<$wide>::get(input)?).map_err(|_| WireError::Range($name))
            }
        }
    )*};
}
narrow!(u32 => u64, "u32"; u16 => u64, "u16"; i32 => i64, "i32");

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        match input.take(1)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Range("bool")),
        }
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self.as_bytes(), out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let n = input.length()?;
        String::from_utf8(input.take(n)?.to_vec()).map_err(|_| WireError::Utf8)
    }
}

/// Bytes that are not text, such as a BPF program; a `Vec<u8>` of its own so that it is one copy, not a list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

impl Wire for Bytes {
    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(&self.0, out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let n = input.length()?;
        Ok(Bytes(input.take(n)?.to_vec()))
    }
}

impl Wire for OsString {
    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self.as_bytes(), out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(OsString::from_vec(Bytes::get(input)?.0))
    }
}

impl Wire for PathBuf {
    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self.as_os_str().as_bytes(), out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(OsString::get(input)?.into())
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u64).put(out);
        for item in self {
            item.put(out);
        }
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        // Every item is a byte at least, so `length` bounds the count.
        let n = input.length()?;
        let mut items = Vec::with_capacity(n.min(64));
        for _ in 0..n {
            items.push(T::get(input)?);
        }
        Ok(items)
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        if bool::get(input)? { T::get(input).map(Some) } else { Ok(None) }
    }
}

impl<T: Wire> Wire for Box<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (**self).put(out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        T::get(input).map(Box::new)
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn get(input: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok((A::get(input)?, B::get(input)?))
    }
}

/// Defines structs with tagged fields. Every field's type has a default, which is not sent. Tags are never reused.
#[macro_export]
macro_rules! wire_struct {
    ($($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$fmeta:meta])* $tag:literal $field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Default)]
        $vis struct $name { $($(#[$fmeta])* pub $field: $ty),* }

        impl $crate::wire::Wire for $name {
            #[allow(unused_variables)]
            fn put(&self, out: &mut Vec<u8>) {
                $crate::wire::put_block(out, |out| {
                    $(if self.$field != <$ty>::default() {
                        $crate::wire::Wire::put(&($tag as u32), out);
                        $crate::wire::put_block(out, |out| $crate::wire::Wire::put(&self.$field, out));
                    })*
                });
            }
            #[allow(unused_mut, unused_variables)]
            fn get(input: &mut $crate::wire::Reader<'_>) -> Result<Self, $crate::wire::WireError> {
                use $crate::wire::WireError;
                let mut value = Self::default();
                let mut fields = input.block()?;
                let mut seen = 0u64;
                while !fields.is_empty() {
                    let tag = <u32 as $crate::wire::Wire>::get(&mut fields)?;
                    if tag < 64 {
                        if seen & (1 << tag) != 0 { return Err(WireError::Repeated { of: stringify!($name), tag }); }
                        seen |= 1 << tag;
                    }
                    let mut block = fields.block()?;
                    match tag {
                        $($tag => value.$field = $crate::wire::Wire::get(&mut block)?,)*
                        _ => return Err(WireError::UnknownField { of: stringify!($name), tag }),
                    }
                    if !block.is_empty() { return Err(WireError::Range(stringify!($name))); }
                }
                Ok(value)
            }
        }
    )*};
}

/// Defines enums whose variants have a tag and at most one payload. The first variant must be a unit: it is the default.
#[macro_export]
macro_rules! wire_enum {
    ($($(#[$meta:meta])* $vis:vis enum $name:ident { $(#[$dmeta:meta])* $dtag:literal $dvariant:ident, $($(#[$vmeta:meta])* $tag:literal $variant:ident $(($ty:ty))?),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Default)]
        $vis enum $name { $(#[$dmeta])* #[default] $dvariant, $($(#[$vmeta])* $variant $(($ty))?),* }

        impl $crate::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    Self::$dvariant => $crate::wire::Wire::put(&($dtag as u32), out),
                    $($crate::wire_enum!(@pat $variant $(, value: $ty)?) => {
                        $crate::wire::Wire::put(&($tag as u32), out);
                        $($crate::wire_enum!(@put value: $ty, out);)?
                    })*
                }
            }
            #[allow(unused_variables)]
            fn get(input: &mut $crate::wire::Reader<'_>) -> Result<Self, $crate::wire::WireError> {
                match <u32 as $crate::wire::Wire>::get(input)? {
                    $dtag => Ok(Self::$dvariant),
                    $($tag => Ok($crate::wire_enum!(@get $variant, input $(, $ty)?)),)*
                    tag => Err($crate::wire::WireError::UnknownVariant { of: stringify!($name), tag }),
                }
            }
        }
    )*};
    (@pat $variant:ident) => { Self::$variant };
    (@pat $variant:ident, $value:ident: $ty:ty) => { Self::$variant($value) };
    (@put $value:ident: $ty:ty, $out:ident) => { $crate::wire::Wire::put($value, $out) };
    (@get $variant:ident, $input:ident) => { Self::$variant };
    (@get $variant:ident, $input:ident, $ty:ty) => { Self::$variant(<$ty as $crate::wire::Wire>::get($input)?) };
}

#[cfg(test)]
mod tests {
    use super::*;

    wire_struct! {
        struct Old { 1 name: String, 2 ids: Vec<u32> }
        struct New { 1 name: String, 2 ids: Vec<u32>, 3 strict: bool }
    }
    wire_enum! {
        enum Shape { 0 None, 1 Named(String), 2 Inner(Old), 3 Unit }
    }

    fn check<T: Wire + PartialEq + std::fmt::Debug>(value: T) {
        assert_eq!(decode::<T>(&encode(&value)).as_ref(), Ok(&value));
    }

    #[test]
    fn values_survive() {
        for n in [0, 1, 127, 128, 300, u64::MAX] {
            check(n);
        }
        for n in [0, 1, -1, i64::MIN, i64::MAX] {
            check(n);
        }
        check(vec![Some("a".to_string()), None]);
        check(Shape::None);
        check(Shape::Named("x".into()));
        check(Shape::Unit);
        check(Shape::Inner(Old { name: "n".into(), ids: vec![1, 2] }));
        check(New { name: "n".into(), ids: vec![], strict: true });
    }

    #[test]
    fn an_unknown_field_is_refused_and_a_default_is_not_sent() {
        let plain = New { name: "n".into(), ..New::default() };
        assert_eq!(decode::<Old>(&encode(&plain)).unwrap().name, "n");
        let strict = New { strict: true, ..plain };
        assert_eq!(decode::<Old>(&encode(&strict)), Err(WireError::UnknownField { of: "Old", tag: 3 }));
    }

    #[test]
    fn hostile_lengths_and_tags_are_errors() {
        for bytes in [&[0xff_u8, 0xff, 0xff, 0xff, 0x0f][..], &[5, 1], &[4, 1, 1, 0xff, 0xff], &[9; 40], &[0x80; 20], &[]] {
            assert!(decode::<Old>(bytes).is_err(), "{bytes:?}");
        }
        let mut twice = encode(&Old { name: "n".into(), ids: vec![] });
        let body = twice[1..].to_vec();
        twice.extend_from_slice(&body);
        twice[0] *= 2;
        assert_eq!(decode::<Old>(&twice), Err(WireError::Repeated { of: "Old", tag: 1 }));
        assert_eq!(decode::<Shape>(&[77]), Err(WireError::UnknownVariant { of: "Shape", tag: 77 }));
    }
}
