//! The compiler against what it imitates: rules evaluated one by one, libseccomp's own programs, and the kernel's checks.

mod json;
mod kernel;
mod machine;
mod oracle;
mod reference;
