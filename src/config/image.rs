//! What the section `image` may say.

use super::{ConfigError, Image};

impl Image {
    /// Values that make no sense are named with their key.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, value: &dyn ToString, reason| Err(ConfigError::Value { key, value: value.to_string(), reason });
        if !(1..=32).contains(&self.max_parallel_layers) {
            return bad("image.maxParallelLayers", &self.max_parallel_layers, "must be 1 to 32");
        }
        let namespaces = Some(&self.namespace_auth_dir).filter(|dir| !dir.as_os_str().is_empty());
        let paths = [("image.registriesConf", &self.registries_conf), ("image.registriesConfDir", &self.registries_conf_dir)]
            .into_iter()
            .chain(self.certs_dirs.iter().map(|path| ("image.certsDirs", path)))
            .chain(self.auth_files.iter().map(|path| ("image.authFiles", path)))
            .chain(namespaces.map(|path| ("image.namespaceAuthDir", path)));
        for (key, path) in paths {
            if !path.is_absolute() {
                return bad(key, &path.display(), "must be an absolute path");
            }
        }
        for (key, span) in [("image.progressTimeout", self.progress_timeout), ("image.credentialHelperTimeout", self.credential_helper_timeout)] {
            if span.0.is_zero() {
                return bad(key, &"0s", "must be more than nothing");
            }
        }
        match self.pinned.iter().find(|pattern| pattern.is_empty() || pattern.strip_suffix('*').unwrap_or(pattern).contains('*')) {
            Some(pattern) => bad("image.pinned", pattern, "must be a reference or the beginning of one and a *"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_key_and_the_value() {
        let check = |text: &str, words: &[&str]| {
            let image: Image = serde_saphyr::from_str(text).unwrap();
            let error = image.check().unwrap_err().to_string();
            words.iter().for_each(|word| assert!(error.contains(word), "{text:?}: {error}"));
        };
        check("maxParallelLayers: 0\n", &["image.maxParallelLayers", "\"0\""]);
        check("maxParallelLayers: 33\n", &["image.maxParallelLayers", "\"33\""]);
        check("registriesConf: r.conf\n", &["image.registriesConf:", "r.conf", "absolute"]);
        check("registriesConfDir: ''\n", &["image.registriesConfDir", "absolute"]);
        check("authFiles: [/a.json, a.json]\n", &["image.authFiles", "\"a.json\"", "absolute"]);
        check("namespaceAuthDir: a\n", &["image.namespaceAuthDir", "absolute"]);
        check("certsDirs: ['']\n", &["image.certsDirs", "absolute"]);
        check("progressTimeout: 0s\n", &["image.progressTimeout", "more than nothing"]);
        check("credentialHelperTimeout: 0ms\n", &["image.credentialHelperTimeout", "more than nothing"]);
        for pattern in ["a*b", "**", ""] {
            check(&format!("pinned: ['{pattern}']\n"), &["image.pinned", &format!("{pattern:?}")]);
        }
        Image::default().check().unwrap();
    }
}
