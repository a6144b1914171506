//! Short names: those that name no registry.

use super::super::error::ImageError;
use super::super::reference::{Reference, is_short};
use super::{Mode, Registries, RegistriesError};

impl Registries {
    /// The references to pull for what somebody wrote, the first that can be had being meant. One that names its registry stands
    /// for itself. A short one is looked up among the aliases, then in each of `unqualified-search-registries`; where no file
    /// has that key it is Docker Hub's, as everywhere before there was such a file.
    pub(in super::super) fn resolve(&self, text: &str) -> Result<Vec<Reference>, ImageError> {
        let candidates = self.candidates(text)?;
        let fail = |source| ImageError::ShortName { source };
        let name = || text.chars().take(300).collect();
        match (candidates.len(), self.mode) {
            (0, _) => Err(fail(RegistriesError::NoSearch { name: name() })),
            (1, _) | (_, Mode::Permissive | Mode::Disabled) => Ok(candidates),
            (_, Mode::Enforcing) => {
                let registries = candidates.iter().map(|candidate| candidate.domain().to_string()).collect();
                Err(fail(RegistriesError::Ambiguous { name: name(), registries }))
            }
        }
    }

    /// Under which names something is to be looked for among the images that are there: the same, whatever the mode.
    pub(in super::super) fn candidates(&self, text: &str) -> Result<Vec<Reference>, ImageError> {
        let plain = Reference::parse(text)?;
        if !is_short(text) {
            return Ok(vec![plain]);
        }
        let end = text.find([':', '@']).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        if let Some(full) = self.aliases.get(name) {
            return Ok(vec![Reference::parse(&format!("{full}{rest}"))?]);
        }
        match &self.search {
            None => Ok(vec![plain]),
            Some(search) => search.iter().map(|registry| Reference::parse(&format!("{registry}/{text}"))).collect(),
        }
    }
}
