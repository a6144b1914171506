//! Identifiers of sandboxes, containers and images: parsed once, then trusted as path components.

use std::fmt;

/// Why a string is no identifier.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} {value:?} is not 1 to 64 characters of [a-z0-9]")]
pub struct BadId {
    /// What the string was to name.
    pub what: &'static str,
    /// The string, cut to 80 characters.
    pub value: String,
}

macro_rules! id {
    ($(#[$meta:meta])* $name:ident, $what:literal) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// Parses an identifier.
            pub fn parse(value: &str) -> Result<Self, BadId> {
                let fits = (1..=64).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
                if fits { Ok(Self(value.to_string())) } else { Err(BadId { what: $what, value: value.chars().take(80).collect() }) }
            }

            /// From 32 random bytes: 64 hexadecimal digits, as every runtime's are.
            pub fn from_random(bytes: [u8; 32]) -> Self {
                Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 12 characters, for people.
            pub fn short(&self) -> &str {
                &self.0[..self.0.len().min(12)]
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        #[cfg(feature = "spec")]
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&self.0)
            }
        }

        #[cfg(feature = "spec")]
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(from)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// A pod sandbox.
    SandboxId,
    "sandbox id"
);
id!(
    /// A container.
    ContainerId,
    "container id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_identifiers_are_parsed() {
        let check = |text: &str, fits: bool| assert_eq!(ContainerId::parse(text).is_ok(), fits, "{text:?}");
        check("abc123", true);
        check(&"a".repeat(64), true);
        for bad in ["", "A", "a/b", "..", "a b", "ä", &"a".repeat(65)] {
            check(bad, false);
        }
        assert_eq!(SandboxId::from_random([0xab; 32]).as_str(), "ab".repeat(32));
    }
}
