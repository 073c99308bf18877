//! Kernels that are broken on purpose, to see that somebody notices.

use super::shader::{Abilities, Kernel};

/// Kernels that give wrong results, as on a driver that miscompiles them.
///
/// Each is the name of a kernel, that of its file under `shaders/`; or with one of the abilities
/// `f16`, `subgroups`, `packed_dot` and `matrix_unit` behind a plus sign, such as `norm+subgroups`: then only variants
/// for devices with it are broken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sabotage(pub Vec<String>);

/// A kernel that does nothing at all.
const NOTHING: &str = "@compute @workgroup_size(1)\nfn main() {}\n";

impl Sabotage {
    /// What becomes of a kernel's code.
    pub(super) fn of(&self, kernel: Kernel, abilities: Abilities, wgsl: String) -> String {
        let hit = |name: &String| match name.split_once('+') {
            None => kernel.name() == name,
            Some((name, ability)) => {
                let has = match ability {
                    "f16" => abilities.f16,
                    "subgroups" => abilities.subgroups,
                    "packed_dot" => abilities.packed_dot,
                    "matrix_unit" => abilities.matrix_unit.is_some(),
                    _ => false,
                };
                has && kernel.name() == name
            }
        };
        match self.0.iter().find(|name| hit(name)) {
            None => wgsl,
            // Most rows still come out nearly right.
            Some(name) if name.ends_with("+subgroups") && wgsl.contains("subgroupAdd(") => {
                wgsl.replace("subgroupAdd(", "subgroupMax(")
            }
            Some(_) => NOTHING.to_owned(),
        }
    }
}
