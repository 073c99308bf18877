//! Compiles kernels.

use super::recorder::PARAMETER_BYTES;
use super::sabotage::Sabotage;
use super::shader::{Abilities, Binding, Kernel};

/// A compiled kernel and the layout of its bind group.
pub(super) struct Pipeline {
    pub raw: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    /// Where each buffer that the operation passes is bound.
    pub bindings: Vec<u32>,
}

impl Pipeline {
    /// Compiles `kernel`, or what is left of it. Errors go to wgpu's error scopes.
    pub(super) fn new(
        device: &wgpu::Device,
        kernel: Kernel,
        abilities: Abilities,
        sabotage: &Sabotage,
    ) -> Self {
        let program = kernel.program(abilities);
        let wgsl = sabotage.of(kernel, abilities, program.wgsl());
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(kernel.name()),
            source: wgpu::ShaderSource::Wgsl(wgsl.into()),
        };
        // Without this, wgpu counts the iterations of every loop to be sure that it ends, and a
        // compiler cannot unroll what counts: the tiled kernels ran two to three times slower.
        let checks = wgpu::ShaderRuntimeChecks {
            force_loop_bounding: false,
            ..wgpu::ShaderRuntimeChecks::checked()
        };
        // SAFETY: every loop of our shaders ends: each counts towards a bound that it does not
        // change. Bounds checks stay on.
        let module = unsafe { device.create_shader_module_trusted(descriptor, checks) };

        let parameters = wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Uniform,
                has_dynamic_offset: true,
                min_binding_size: wgpu::BufferSize::new(PARAMETER_BYTES as u64),
            },
            count: None,
        };
        let buffers = program.bindings.iter().map(|&(binding, kind)| wgpu::BindGroupLayoutEntry {
            binding,
            ty: wgpu::BindingType::Buffer {
                ty: match kind {
                    Binding::Uniform => wgpu::BufferBindingType::Uniform,
                    Binding::Read => wgpu::BufferBindingType::Storage { read_only: true },
                    Binding::Write => wgpu::BufferBindingType::Storage { read_only: false },
                },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            ..parameters
        });
        let entries: Vec<_> = std::iter::once(parameters).chain(buffers).collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(kernel.name()),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.name()),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let raw = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name()),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        let bindings = program.bindings.iter().map(|&(binding, _)| binding).collect();
        Self { raw, layout, bindings }
    }
}
