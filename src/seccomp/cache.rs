//! Filters that were compiled before. A node runs hundreds of containers with a handful of profiles.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Arch, Profile, SeccompError, compile, default, runtime_default};

/// How many filters are kept: a few KiB each.
const CAPACITY: usize = 32;

/// Compiled filters, the ones used last first. Shared by reference between threads.
#[derive(Debug, Default)]
pub struct Cache {
    entries: Mutex<VecDeque<(Key, Arc<[u8]>)>>,
}

/// What a filter depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    /// The default profile, by the capabilities that change it.
    Default { capabilities: u64, arch: Arch, kernel: (u32, u32) },
    /// A profile of somebody's own.
    Own { profile: Box<Profile>, native: Arch },
}

impl Cache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// The filter of [`runtime_default`], with the same parameters.
    pub fn runtime_default(&self, capabilities: u64, arch: Arch, kernel: (u32, u32)) -> Result<Arc<[u8]>, SeccompError> {
        let key = Key::Default { capabilities: default::relevant(capabilities), arch, kernel };
        self.get(|other| *other == key).map_or_else(|| Ok(self.put(key.clone(), compile(&runtime_default(capabilities, arch, kernel), arch)?)), Ok)
    }

    /// The filter of a profile, as [`compile`] makes it.
    pub fn profile(&self, profile: &Profile, native: Arch) -> Result<Arc<[u8]>, SeccompError> {
        let known = self.get(|other| matches!(other, Key::Own { profile: own, native: arch } if **own == *profile && *arch == native));
        known.map_or_else(|| Ok(self.put(Key::Own { profile: Box::new(profile.clone()), native }, compile(profile, native)?)), Ok)
    }

    fn get(&self, is: impl Fn(&Key) -> bool) -> Option<Arc<[u8]>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let index = entries.iter().position(|(key, _)| is(key))?;
        let entry = entries.remove(index)?;
        let filter = entry.1.clone();
        entries.push_front(entry);
        Some(filter)
    }

    /// Keeps a filter. Two threads that compile the same at once both come here; the second one's is dropped.
    fn put(&self, key: Key, filter: Vec<u8>) -> Arc<[u8]> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = entries.iter().find(|(other, _)| *other == key) {
            return known.clone();
        }
        let filter: Arc<[u8]> = filter.into();
        entries.push_front((key, filter.clone()));
        entries.truncate(CAPACITY);
        filter
    }
}

#[cfg(test)]
mod tests {
    use super::super::Action;
    use super::*;

    #[test]
    fn a_filter_is_compiled_once() {
        let cache = Cache::new();
        let default = |capabilities| cache.runtime_default(capabilities, Arch::X86_64, (6, 1)).unwrap();
        assert!(Arc::ptr_eq(&default(0), &default(1)), "CAP_CHOWN changes nothing");
        assert!(!Arc::ptr_eq(&default(0), &default(1 << 21)));
        assert_eq!(*default(1 << 21), *compile(&runtime_default(1 << 21, Arch::X86_64, (6, 1)), Arch::X86_64).unwrap());

        let profile = runtime_default(0, Arch::X86_64, (6, 1));
        let own = cache.profile(&profile, Arch::X86_64).unwrap();
        assert!(Arc::ptr_eq(&own, &cache.profile(&profile.clone(), Arch::X86_64).unwrap()));
        assert!(!Arc::ptr_eq(&own, &cache.profile(&profile, Arch::Aarch64).unwrap()));
    }

    #[test]
    fn what_was_not_used_longest_goes() {
        let cache = Cache::new();
        let nth = |errno| {
            let profile = Profile { default_action: Action::Errno(errno), architectures: vec![], rules: vec![], flags: Default::default() };
            cache.profile(&profile, Arch::X86_64).unwrap()
        };
        let first = nth(0);
        for errno in 1..CAPACITY as u16 {
            nth(errno);
        }
        assert!(Arc::ptr_eq(&first, &nth(0)));
        let second = nth(CAPACITY as u16);
        assert!(Arc::ptr_eq(&first, &nth(0)));
        assert!(Arc::ptr_eq(&second, &nth(CAPACITY as u16)));
        assert_eq!(cache.entries.lock().unwrap().len(), CAPACITY);
    }
}
