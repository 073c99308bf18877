//! `deltallm devices`: which GPUs there are, and which one `--device auto` takes.

use std::io::{self, Write};

use deltallm::backend::{Backend, DeviceKind};
use deltallm::cpu::{Cpu, Kernels};
use deltallm::gpu::{Adapter, Gpu, GpuOptions, MatrixUnit, Select, adapters};

use crate::output::{Outcome, bytes};

/// Options of `devices`.
#[derive(clap::Args)]
pub struct Args {
    /// Open each adapter, and fail if there is none that can be opened, be it a software one
    #[arg(long)]
    check: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let mut out = io::stdout().lock();
    let adapters = adapters();
    for adapter in &adapters {
        describe(&mut out, adapter)?;
    }
    if adapters.is_empty() {
        writeln!(out, "no GPU adapter: no Vulkan, Metal or DX12 driver was found")?;
    }
    let cpu = Cpu::new(None)?;
    writeln!(out, "{} (CPU)\n  driver            {}", cpu.device().name, cpu.device().driver)?;
    writeln!(out, "  instructions      {}", Kernels::listed())?;

    let hardware = adapters.iter().find(|adapter| adapter.kind != DeviceKind::SoftwareGpu);
    let (choice, reason) = match hardware {
        Some(adapter) => (&adapter.name, "the first GPU of the fastest kind"),
        None => (&cpu.device().name, "there is no hardware GPU"),
    };
    writeln!(out, "\n--device auto takes {choice}: {reason}")?;
    if args.check { check(&mut out, &adapters) } else { Ok(()) }
}

/// What an adapter is and can do.
pub fn describe(out: &mut impl Write, adapter: &Adapter) -> io::Result<()> {
    let subgroups = match adapter.subgroups {
        Some((least, most)) if least == most => format!("yes, of {least}"),
        Some((least, most)) => format!("yes, of {least} to {most}"),
        None => "no".to_owned(),
    };
    let matrix_unit = match adapter.matrix_unit {
        Some(MatrixUnit { f16, f32, .. }) => {
            let of = |size: Option<u32>, what| size.map(|size| format!("{size}x{size} of {what}"));
            let kinds: Vec<_> = [of(f16, "f16"), of(f32, "f32")].into_iter().flatten().collect();
            format!("yes, {}", kinds.join(" and "))
        }
        None => "no".to_owned(),
    };
    writeln!(out, "{} ({}, {})", adapter.name, adapter.kind.name(), adapter.backend)?;
    writeln!(out, "  driver            {}", adapter.driver)?;
    writeln!(out, "  f16               {}", if adapter.f16 { "yes" } else { "no" })?;
    writeln!(out, "  subgroups         {subgroups}")?;
    writeln!(out, "  matrix unit       {matrix_unit}")?;
    writeln!(out, "  largest buffer    {}", bytes(adapter.max_buffer))?;
    writeln!(out, "  largest binding   {}", bytes(adapter.max_binding))?;
    writeln!(out, "  workgroup memory  {}", bytes(adapter.workgroup_memory.into()))
}

/// Opens every adapter; the first that opens is enough.
fn check(out: &mut impl Write, adapters: &[Adapter]) -> Outcome {
    let mut last = None;
    for adapter in adapters {
        let select = Select::Named(adapter.name.clone());
        match Gpu::open(&GpuOptions { select, ..GpuOptions::default() }) {
            Ok(_) => {
                writeln!(out, "{} opens", adapter.name)?;
                return Ok(());
            }
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error.into()),
        // The error lists what was found: nothing.
        None => Gpu::open(&GpuOptions::default()).map(drop).map_err(Into::into),
    }
}
