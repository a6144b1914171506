//! How a command's end is told: the `metav1.Status` of version 4 of the remote command protocol, and the texts before it.

use serde::Serialize;

use super::upgrade::Version;

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With exit code 0, or detached in order.
    Success,
    /// With another exit code.
    Exit(i32),
    /// Not at all: why.
    Failure(String),
}

#[derive(Serialize)]
struct Status<'a> {
    metadata: Empty,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Details<'a> {
    causes: [Cause<'a>; 1],
}

#[derive(Serialize)]
struct Cause<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    message: &'a str,
}

impl End {
    /// What stands on the error stream; nothing at all for a success before version 4.
    pub fn told(&self, version: Version) -> Vec<u8> {
        let text = match self {
            End::Success => String::new(),
            End::Exit(code) => format!("command terminated with non-zero exit code: exit status {code}"),
            End::Failure(why) => format!("Internal error occurred: {why}"),
        };
        if version < Version::V4 {
            return text.into_bytes();
        }
        let status = match self {
            End::Success => Status { metadata: Empty {}, status: "Success", message: None, reason: None, details: None, code: None },
            End::Exit(code) => {
                let code = code.to_string();
                return json(&failure(&text, "NonZeroExitCode", Some("ExitCode"), &code, None));
            }
            End::Failure(why) => failure(&text, "InternalError", None, why, Some(500)),
        };
        json(&status)
    }
}

fn failure<'a>(text: &'a str, reason: &'static str, cause: Option<&'static str>, message: &'a str, code: Option<u16>) -> Status<'a> {
    let details = Some(Details { causes: [Cause { reason: cause, message }] });
    Status { metadata: Empty {}, status: "Failure", message: Some(text), reason: Some(reason), details, code }
}

fn json(status: &Status<'_>) -> Vec<u8> {
    serde_json::to_vec(status).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_as_kubelet_tells_them() {
        let check = |end: End, version, expected: &str| assert_eq!(String::from_utf8(end.told(version)).unwrap(), expected);
        check(End::Success, Version::V1, "");
        check(End::Exit(3), Version::V3, "command terminated with non-zero exit code: exit status 3");
        check(End::Failure("no".into()), Version::V2, "Internal error occurred: no");
        check(End::Success, Version::V4, r#"{"metadata":{},"status":"Success"}"#);
        check(
            End::Exit(137),
            Version::V5,
            r#"{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: exit status 137","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"137"}]}}"#,
        );
        check(
            End::Failure("a \"b\"".into()),
            Version::V4,
            r#"{"metadata":{},"status":"Failure","message":"Internal error occurred: a \"b\"","reason":"InternalError","details":{"causes":[{"message":"a \"b\""}]},"code":500}"#,
        );
    }
}
