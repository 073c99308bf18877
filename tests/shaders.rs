//! Every variant of every shader is valid WGSL and translates to what Vulkan, Metal and DX12 take.

use deltallm::gpu::{ShaderSource, shader_sources};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

fn check(source: &ShaderSource) -> Result<(), String> {
    let module = naga::front::wgsl::parse_str(&source.wgsl)
        .map_err(|error| error.emit_to_string(&source.wgsl))?;
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::SUBGROUP
        | Capabilities::SUBGROUP_BARRIER
        | Capabilities::COOPERATIVE_MATRIX;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .map_err(|error| error.emit_to_string(&source.wgsl))?;
    vulkan(&module, &info).map_err(|error| format!("SPIR-V: {error}"))?;
    metal(&module, &info).map_err(|error| format!("MSL: {error}"))?;
    // naga writes no HLSL for matrix units: wgpu offers none with DX12, and no such kernel is linked there.
    if uses_matrix_unit(source) {
        return Ok(());
    }
    dx12(&module, &info).map_err(|error| format!("HLSL: {error}"))
}

fn uses_matrix_unit(source: &ShaderSource) -> bool {
    source.wgsl.contains("enable wgpu_cooperative_matrix;")
}

fn vulkan(module: &naga::Module, info: &ModuleInfo) -> Result<(), String> {
    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    let words = spv::write_vec(module, info, &options, None).map_err(|e| e.to_string())?;
    if words.is_empty() { Err("nothing was written".into()) } else { Ok(()) }
}

fn metal(module: &naga::Module, info: &ModuleInfo) -> Result<(), String> {
    let options =
        msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    let pipeline = msl::PipelineOptions::default();
    let written = msl::write_string(module, info, &options, &pipeline);
    let (text, _) = written.map_err(|e| e.to_string())?;
    if text.contains("kernel void") { Ok(()) } else { Err("no kernel was written".into()) }
}

fn dx12(module: &naga::Module, info: &ModuleInfo) -> Result<(), String> {
    let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..Default::default() };
    let pipeline = hlsl::PipelineOptions::default();
    let mut text = String::new();
    let mut writer = hlsl::Writer::new(&mut text, &options, &pipeline);
    writer.write(module, info, None).map_err(|e| e.to_string())?;
    if text.contains("numthreads") { Ok(()) } else { Err("no kernel was written".into()) }
}

#[test]
fn every_variant_is_valid_and_translates() {
    let sources = shader_sources();
    assert!(!sources.is_empty());
    let failures: Vec<String> = sources
        .iter()
        .filter_map(|s| check(s).err().map(|error| format!("{}: {error}", s.name)))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// 16 KiB is what a device must offer, and twice as much one whose matrix unit is used; wgpu itself does
/// not check it.
#[test]
fn workgroup_memory_and_size_stay_within_the_floor() {
    for source in shader_sources() {
        let module = naga::front::wgsl::parse_str(&source.wgsl).expect("checked by another test");
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).expect("a valid module has a layout");
        let info = Validator::new(ValidationFlags::all(), Capabilities::all())
            .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
            .subgroup_operations(naga::valid::SubgroupOperationSet::all())
            .validate(&module)
            .expect("checked by another test");
        let used = info.get_entry_point(0);
        let bytes: u32 = module
            .global_variables
            .iter()
            .filter(|(handle, variable)| {
                variable.space == naga::AddressSpace::WorkGroup && !used[*handle].is_empty()
            })
            .map(|(_, variable)| layouter[variable.ty].size)
            .sum();
        let most = if uses_matrix_unit(&source) { 32 << 10 } else { 16 << 10 };
        assert!(bytes <= most, "{}: {bytes} bytes of workgroup memory", source.name);
        let size: u32 = module.entry_points[0].workgroup_size.iter().product();
        assert!(size <= 256, "{}: {size} invocations", source.name);
        let storage = module
            .global_variables
            .iter()
            .filter(|(_, variable)| matches!(variable.space, naga::AddressSpace::Storage { .. }));
        assert!(storage.count() <= 8, "{}: too many storage buffers", source.name);
    }
}
