//! Debian's docker-registry on a loopback port, with everything it needs in a directory of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use copepod::sys::process::command;

use super::sample::{MANIFEST, Sample};
use copepod::image::digest::Digest;

/// The user it knows, whose password is `secret`.
pub const USER: &str = "pod";
/// bcrypt of `secret`.
const HASH: &str = "$2y$05$CopepodCopepodCopepodeduQ3XmFT0TrXXMUxRi0ivDPZXmMrLZy";

pub struct Registry {
    pub host: String,
    child: Child,
    plain: bool,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// Starts it. `tls`: certificate and key.
    pub fn start(directory: &Path, user: bool, tls: Option<(&Path, &Path)>) -> Self {
        Self::start_for(directory, user, tls, None)
    }

    /// Likewise. `clients`: who has no certificate of this CA is not served.
    pub fn start_for(directory: &Path, user: bool, tls: Option<(&Path, &Path)>, clients: Option<&Path>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let passwords = directory.join("htpasswd");
        std::fs::write(&passwords, format!("{USER}:{HASH}\n")).unwrap();
        let mut text = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
            directory.join("data").display()
        );
        if let Some((certificate, key)) = tls {
            text.push_str(&format!("  tls:\n    certificate: {}\n    key: {}\n", certificate.display(), key.display()));
        }
        if let Some(ca) = clients {
            text.push_str(&format!("    clientcas:\n      - {}\n", ca.display()));
        }
        if user {
            text.push_str(&format!("auth:\n  htpasswd:\n    realm: copepod\n    path: {}\n", passwords.display()));
        }
        let config = directory.join("config.yml");
        std::fs::write(&config, text).unwrap();
        let mut child = command("docker-registry").arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let listening = lines.by_ref().map_while(Result::ok).any(|line| line.contains("listening on"));
        assert!(listening, "docker-registry does not start");
        // It must always find a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { host, child, plain: tls.is_none() }
    }

    /// Pushes an image over HTTP.
    pub fn push(&self, repository: &str, name: &str, sample: &Sample) {
        assert!(self.plain);
        for layer in &sample.layers {
            self.upload(repository, &layer.blob);
        }
        self.upload(repository, sample.config.as_bytes());
        self.send("PUT", &format!("/v2/{repository}/manifests/{name}"), MANIFEST, sample.manifest.as_bytes());
    }

    fn upload(&self, repository: &str, bytes: &[u8]) {
        let head = self.send("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"");
        let location = head.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap();
        let path = location.strip_prefix(&format!("http://{}", self.host)).unwrap();
        self.send("PUT", &format!("{path}&digest={}", Digest::of(bytes)), "application/octet-stream", bytes);
    }

    fn send(&self, method: &str, path: &str, media_type: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.host).unwrap();
        // base64 of pod:secret.
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Basic cG9kOnNlY3JldA==\r\nconnection: close\r\ncontent-type: {media_type}\r\ncontent-length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
        answer
    }
}

/// A CA and a certificate for 127.0.0.1 and `secure.test` that it signed, good for a server and a client: certificate, key, CA.
pub fn certificate(directory: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let path = |name: &str| directory.join(name);
    let run = |arguments: &[&str]| {
        let output = command("openssl").args(arguments).current_dir(directory).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    std::fs::write(path("ext"), "subjectAltName=IP:127.0.0.1,DNS:secure.test\nbasicConstraints=CA:FALSE\n").unwrap();
    run(&[
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=ca",
        "-days",
        "2",
    ]);
    run(&["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=registry"]);
    run(&[
        "x509",
        "-req",
        "-in",
        "csr.pem",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-out",
        "cert.pem",
        "-extfile",
        "ext",
        "-days",
        "2",
    ]);
    (path("cert.pem"), path("key.pem"), path("ca.pem"))
}
