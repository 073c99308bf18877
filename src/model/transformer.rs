//! The forward pass, once for every architecture and every backend.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::{Decoder, LoadProgress, MemoryUse, Output, Probe, SessionShape, WeightFormat};
use crate::backend::{
    Backend, CacheShape, DeviceInfo, DeviceKind, Footprint, Input, KeyValueCache, MatrixFormat,
    ModelPlan, Operations, ReadSpeed, Step, StreamShape, TensorFormat,
};
use crate::checkpoint::{Checkpoint, MatrixSource, ModelConfig, Tensors};
use crate::delta::{CacheImage, Originals, Page, Phase};
use crate::error::{Error, Result};
use crate::session::Cancel;

/// A decoder-only transformer whose weights lie on a device.
///
/// Llama (<https://arxiv.org/abs/2407.21783>) and BitNet b1.58 2B4T
/// (<https://arxiv.org/abs/2504.12285>) are two configurations of it: BitNet has sub-norms before
/// its output and down projections, and ternary linears that read 8-bit activations.
pub(crate) struct Transformer<B: Backend> {
    backend: B,
    config: ModelConfig,
    /// `[vocabulary, hidden]`.
    embedding: B::Linear,
    layers: Vec<Layer<B>>,
    /// `[hidden]`.
    final_norm: B::Norm,
    /// `[vocabulary, hidden]`; `None` where the embedding serves.
    head: Option<B::Linear>,
}

/// The weights of one decoder layer.
struct Layer<B: Backend> {
    /// `[hidden]`.
    input_norm: B::Norm,
    /// Query, key and value projections stacked: `[(H + 2 G) D, hidden]`.
    qkv: B::Linear,
    /// `[H D]`, BitNet only.
    attn_sub_norm: Option<B::Norm>,
    /// `[hidden, H D]`.
    output: B::Linear,
    /// `[hidden]`.
    post_attention_norm: B::Norm,
    /// Gate and up projections stacked: `[2 I, hidden]`.
    gate_up: B::Linear,
    /// `[I]`, BitNet only.
    ffn_sub_norm: Option<B::Norm>,
    /// `[hidden, I]`.
    down: B::Linear,
}

/// What a session holds on the device.
pub(crate) struct Run<B: Backend> {
    model: Arc<Transformer<B>>,
    stream: B::Stream,
    activations: Activations<B>,
    /// Keys and values, a cache a layer.
    caches: Vec<B::Cache>,
    rope: B::Rope,
    /// Tokens in the caches.
    length: usize,
    /// Which original keys the caches still have.
    originals: Originals,
    /// Whether caches may hold more than `length` tokens still.
    cut: bool,
    shape: SessionShape,
}

/// Where in a layer the forward pass can be looked at, with the layer's index.
#[derive(Clone, Copy)]
pub(super) enum Site {
    /// Behind its attention.
    Attention(usize),
    /// At its end.
    Layer(usize),
}

/// The intermediate results of a step over `T` tokens, overwritten layer by layer.
pub(super) struct Activations<B: Backend> {
    /// The residual stream, `[T, hidden]`.
    pub hidden: B::Tensor,
    /// Input of a projection after its norm, `[T, hidden]`; 8 bits for BitNet.
    normed: B::Tensor,
    /// `[T, (H + 2 G) D]`.
    pub qkv: B::Tensor,
    /// `[T, H D]`.
    pub attended: B::Tensor,
    /// `[T, 2 I]`.
    pub gate_up: B::Tensor,
    /// `[T, I]`; 8 bits for BitNet.
    gated: B::Tensor,
    /// The residual stream after the last norm, where logits are wanted, `[R, hidden]`.
    last: B::Tensor,
    /// `[R, vocabulary]`.
    logits: B::Tensor,
}

impl<B: Backend> Transformer<B> {
    /// The forward pass over `tokens`, which continue what is in the caches.
    ///
    /// `look` sees the results behind the attention and at the end of each layer.
    ///
    /// Everything is recorded, nothing waited for. Logits are made of the last token for
    /// [`Output::Sample`] and [`Output::LastLogits`], of every token for [`Output::AllLogits`].
    fn forward(
        &self,
        run: &mut Run<B>,
        input: Input<'_>,
        phase: Phase,
        output: Output<'_>,
        mut look: impl FnMut(Site, &mut B::Stream, &Activations<B>) -> Result<()>,
    ) -> Result<()> {
        let Run { stream, activations: a, caches, rope, length, .. } = run;
        let t = input.count();

        stream.begin(&Step { input, position: *length, phase })?;
        stream.embed(&self.embedding, &mut a.hidden)?;
        for (index, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            // hidden += W_o attention(norm(hidden))
            stream.norm(&a.hidden, 0..t, &layer.input_norm, &mut a.normed)?;
            stream.linear(&a.normed, &layer.qkv, &mut a.qkv)?;
            stream.rope_append(&mut a.qkv, rope, cache)?;
            stream.encode_keys(cache)?;
            stream.attention(&a.qkv, cache, &mut a.attended)?;
            look(Site::Attention(index), stream, a)?;
            if let Some(sub_norm) = &layer.attn_sub_norm {
                stream.norm(&a.attended, 0..t, sub_norm, &mut a.normed)?;
                stream.linear_add(&a.normed, &layer.output, &mut a.hidden)?;
            } else {
                stream.linear_add(&a.attended, &layer.output, &mut a.hidden)?;
            }

            // hidden += W_down (act(W_gate norm(hidden)) * W_up norm(hidden))
            stream.norm(&a.hidden, 0..t, &layer.post_attention_norm, &mut a.normed)?;
            stream.linear(&a.normed, &layer.gate_up, &mut a.gate_up)?;
            let sub_norm = layer.ffn_sub_norm.as_ref();
            stream.gate(&a.gate_up, self.config.activation, sub_norm, &mut a.gated)?;
            stream.linear_add(&a.gated, &layer.down, &mut a.hidden)?;
            look(Site::Layer(index), stream, a)?;
        }
        let wanted = match output {
            Output::Nothing => t..t,
            Output::Sample(_) | Output::LastLogits => t - 1..t,
            Output::AllLogits => 0..t,
        };
        if !wanted.is_empty() {
            stream.norm(&a.hidden, wanted, &self.final_norm, &mut a.last)?;
            stream.linear(&a.last, self.head.as_ref().unwrap_or(&self.embedding), &mut a.logits)?;
        }
        if let Output::Sample(step) = output {
            stream.sample(&a.logits, step)?;
        }
        stream.submit()?;
        Ok(())
    }

    /// Brings the weights of a checkpoint to the device, layer by layer.
    pub fn load(
        backend: B,
        checkpoint: &Checkpoint,
        weights: WeightFormat,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let mut loader = Loader {
            backend: &backend,
            tensors: &checkpoint.tensors,
            config: &checkpoint.config,
            weights,
            done: LoadProgress { bytes: 0, total: checkpoint.tensors.total_bytes() },
            progress,
        };
        let plan = loader.plan()?;
        backend.announce(&plan);
        let ModelConfig { vocabulary, hidden, .. } = checkpoint.config;
        let embedding = loader.float("model.embed_tokens", vocabulary, hidden)?;
        let layers = (0..checkpoint.config.layers)
            .map(|index| loader.layer(index))
            .collect::<Result<Vec<_>>>()?;
        let final_norm = loader.norm("model.norm", hidden)?;
        let head = if checkpoint.config.tied_head == Some(false) {
            Some(loader.float("lm_head", vocabulary, hidden)?)
        } else {
            None
        };
        checkpoint.tensors.check_all_used()?;
        loader.finish()?;
        backend.vouch_for_model(&plan)?;
        let config = checkpoint.config.clone();
        Ok(Self { backend, config, embedding, layers, final_norm, head })
    }

    /// Bytes of the weights on the device.
    fn weight_bytes(&self) -> u64 {
        let layer = |l: &Layer<B>| {
            let norms = [&l.input_norm, &l.post_attention_norm];
            let sub_norms = [&l.attn_sub_norm, &l.ffn_sub_norm];
            let linears = [&l.qkv, &l.output, &l.gate_up, &l.down];
            norms.iter().map(|n| n.bytes()).sum::<u64>()
                + sub_norms.iter().filter_map(|n| n.as_ref()).map(Footprint::bytes).sum::<u64>()
                + linears.iter().map(|l| l.bytes()).sum::<u64>()
        };
        self.embedding.bytes()
            + self.layers.iter().map(layer).sum::<u64>()
            + self.final_norm.bytes()
            + self.head.as_ref().map_or(0, Footprint::bytes)
    }

    fn activations(&self, shape: &SessionShape) -> Result<Activations<B>> {
        let ModelConfig { hidden, intermediate, attention, vocabulary, .. } = self.config;
        let projected = match self.config.ternary {
            Some(_) => TensorFormat::Int8,
            None => TensorFormat::F32,
        };
        let make = |rows, width, format| self.backend.tensor(rows, width, format);
        let (rows, wanted) = (shape.chunk, shape.logit_rows);
        Ok(Activations {
            hidden: make(rows, hidden, TensorFormat::F32)?,
            normed: make(rows, hidden, projected)?,
            qkv: make(rows, attention.qkv_width(), TensorFormat::F32)?,
            attended: make(rows, attention.width(), TensorFormat::F32)?,
            gate_up: make(rows, 2 * intermediate, TensorFormat::F32)?,
            gated: make(rows, intermediate, projected)?,
            last: make(wanted, hidden, TensorFormat::F32)?,
            logits: make(wanted, vocabulary, TensorFormat::F32)?,
        })
    }
}

/// Fails where the system would not give so much memory, without touching any: a vector that cannot
/// grow ends the process.
fn check_host_memory(device: &DeviceInfo, what: String, needed: u64, held: u64) -> Result<()> {
    let reserved = match usize::try_from(needed) {
        Ok(bytes) => Vec::<u8>::new().try_reserve_exact(bytes).is_ok(),
        Err(_) => false,
    };
    if reserved {
        return Ok(());
    }
    Err(Error::DeviceMemory { device: device.name.clone(), what, needed, held })
}

impl<B: Backend> super::Engine for Transformer<B> {
    fn device(&self) -> &DeviceInfo {
        self.backend.device()
    }

    fn weight_bytes(&self) -> u64 {
        Transformer::weight_bytes(self)
    }

    fn device_bytes(&self) -> Option<u64> {
        self.backend.held()
    }

    fn max_top_k(&self) -> usize {
        self.backend.max_top_k()
    }

    fn look_ahead(&self) -> usize {
        self.backend.look_ahead()
    }

    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed> {
        self.backend.read_speed(bytes)
    }

    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64> {
        self.backend.multiply_speed(format)
    }

    fn can_be_lost(&self) -> bool {
        self.backend.can_be_lost()
    }

    fn give_up(&self) {
        self.backend.give_up();
    }

    fn start(self: Arc<Self>, shape: SessionShape) -> Result<Box<dyn Decoder>> {
        let ModelConfig { attention, vocabulary, layers, .. } = self.config;
        self.backend.check_rope(shape.context, attention.head_dim)?;
        self.backend.vouch_for_attention(attention.head_dim, &shape.policy)?;
        let plan =
            super::plan_memory(&self.config, 4, WeightFormat::Stored, shape.context, &shape.policy);
        let (what, needed) = if self.backend.device().kind == DeviceKind::Cpu {
            let cache = plan.keys.saturating_add(plan.values);
            let what = format!("a context of {} tokens", shape.context);
            (what, cache.saturating_add(plan.activations))
        } else {
            // Made on the host for every device, and collected without knowing its size.
            let table = 8 * (shape.context as u64).saturating_mul(attention.head_dim as u64);
            (format!("the rotary table of {} tokens, on the host", shape.context), table)
        };
        check_host_memory(self.backend.device(), what, needed, self.weight_bytes())?;
        let stream = self.backend.stream(&StreamShape {
            rows: shape.chunk,
            context: shape.context,
            attention,
            vocabulary,
        })?;
        let activations = self.activations(&shape)?;
        let cache = |layer| {
            self.backend.cache(&CacheShape {
                attention,
                context: shape.context,
                rows: shape.chunk,
                policy: shape.policy,
                thresholds: shape.thresholds.as_ref().and_then(|all| all.layer(layer)).cloned(),
            })
        };
        let caches = (0..layers).map(cache).collect::<Result<Vec<_>>>()?;
        let head_dim = attention.head_dim;
        let rope = self.backend.rope(&self.config.rope.table(shape.context, head_dim), head_dim)?;
        let originals = Originals::new(&shape.policy, shape.context, shape.chunk);
        let (length, cut) = (0, false);
        Ok(Box::new(Run {
            model: self,
            stream,
            activations,
            caches,
            rope,
            length,
            originals,
            cut,
            shape,
        }))
    }
}

impl<B: Backend> Run<B> {
    /// Tokens of the largest step.
    pub(super) fn chunk(&self) -> usize {
        self.shape.chunk
    }

    /// Cuts the caches back, if that is still to be done.
    fn settle(&mut self) -> Result<()> {
        if self.cut {
            for cache in &mut self.caches {
                self.stream.truncate(cache, self.length)?;
            }
            self.cut = false;
        }
        Ok(())
    }

    /// Appends tokens. Where that fails, some layers may have them and others not: then all are cut
    /// back before anything else is done.
    pub(super) fn step(
        &mut self,
        input: Input<'_>,
        phase: Phase,
        output: Output<'_>,
        look: impl FnMut(Site, &mut B::Stream, &Activations<B>) -> Result<()>,
    ) -> Result<()> {
        debug_assert!((1..=self.shape.chunk).contains(&input.count()));
        debug_assert!(self.originals.cover(&self.shape.policy.rule(phase), self.length));
        self.settle()?;
        let model = self.model.clone();
        let done = model.forward(self, input, phase, output, look);
        self.originals.write_until(self.length + input.count());
        match done {
            Ok(()) => self.length += input.count(),
            Err(_) => self.cut = true,
        }
        done
    }
}

impl<B: Backend> Decoder for Run<B> {
    fn length(&self) -> usize {
        self.length
    }

    fn truncate(&mut self, length: usize) {
        if length < self.length {
            (self.length, self.cut) = (length, true);
        }
        if length == 0 {
            self.originals.restart(0);
        }
    }

    fn settle(&mut self) -> Result<()> {
        Run::settle(self)
    }

    fn can_continue(&self, phase: Phase) -> bool {
        self.originals.can_continue(&self.shape.policy, phase, self.length)
    }

    fn forget_originals(&mut self, from: usize) {
        self.originals.forget(from);
    }

    fn forward(&mut self, input: Input<'_>, phase: Phase, output: Output<'_>) -> Result<()> {
        self.step(input, phase, output, |_, _, _| Ok(()))
    }

    fn probe(&mut self, tokens: &[u32], phase: Phase, probe: Probe<'_>) -> Result<()> {
        let input = Input::Tokens(tokens);
        self.step(input, phase, Output::Nothing, |site, stream, activations| match site {
            Site::Attention(layer) => probe(layer, &stream.read(&activations.qkv)?),
            Site::Layer(_) => Ok(()),
        })
    }

    fn find_not_finite(&mut self, tokens: &[u32], cancel: &Cancel) -> Result<Option<String>> {
        self.find(tokens, cancel)
    }

    fn pages(&mut self) -> Result<Vec<Vec<Vec<Page>>>> {
        self.settle()?;
        self.caches.iter().map(|cache| self.stream.pages(cache)).collect()
    }

    fn save(&mut self, layer: usize) -> Result<CacheImage> {
        self.settle()?;
        self.stream.save(&self.caches[layer], self.originals.from())
    }

    fn restore(&mut self, images: &Arc<[CacheImage]>) -> Result<()> {
        debug_assert!(self.length == 0 && images.len() == self.caches.len());
        self.settle()?;
        for (cache, image) in self.caches.iter_mut().zip(images.iter()) {
            self.stream.restore(cache, image)?;
            self.length = image.length;
            self.originals.restart(image.exact_from);
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.stream.wait()
    }

    fn token(&mut self) -> Result<u32> {
        self.stream.token()
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        self.stream.read(&self.activations.logits)
    }

    fn memory(&self) -> MemoryUse {
        let a = &self.activations;
        let tensors =
            [&a.hidden, &a.normed, &a.qkv, &a.attended, &a.gate_up, &a.gated, &a.last, &a.logits];
        let held = || self.caches.iter().map(KeyValueCache::held);
        MemoryUse {
            weights: self.model.weight_bytes(),
            keys: held().map(|held| held.keys).sum(),
            values: held().map(|held| held.values).sum(),
            activations: tensors.iter().map(|t| t.bytes()).sum::<u64>() + self.rope.bytes(),
            scratch: self.stream.bytes(),
        }
    }
}

/// Reads tensors by their names in transformers and hands them to a backend.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    tensors: &'a Tensors,
    config: &'a ModelConfig,
    weights: WeightFormat,
    done: LoadProgress,
    progress: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
}

impl<B: Backend> Loader<'_, B> {
    /// What the model will be made of; its first layer stands for all.
    fn plan(&self) -> Result<ModelPlan> {
        let ModelConfig { hidden, vocabulary, intermediate, activation, .. } = *self.config;
        let float =
            |name: &str, rows, cols| self.float_source(name, rows, cols).map(|s| s.format());
        let embedding = float("model.embed_tokens", vocabulary, hidden)?;
        let head = match self.config.tied_head {
            Some(false) => float("lm_head", vocabulary, hidden)?,
            _ => embedding,
        };
        let q = self.config.attention.width();
        let body = match self.config.ternary {
            Some(_) => [MatrixFormat::Ternary; 3],
            None => [
                float("model.layers.0.mlp.gate_proj", intermediate, hidden)?,
                float("model.layers.0.self_attn.o_proj", hidden, q)?,
                float("model.layers.0.mlp.down_proj", hidden, intermediate)?,
            ],
        };
        Ok(ModelPlan { embedding, body, head, activation, intermediate })
    }

    fn layer(&mut self, index: usize) -> Result<Layer<B>> {
        let ModelConfig { hidden, intermediate, attention, .. } = *self.config;
        let (q, kv) = (attention.width(), attention.kv_width());
        let name = |part: &str| format!("model.layers.{index}.{part}");

        let (wq, wk, wv) =
            (name("self_attn.q_proj"), name("self_attn.k_proj"), name("self_attn.v_proj"));
        let (gate, up) = (name("mlp.gate_proj"), name("mlp.up_proj"));
        Ok(Layer {
            input_norm: self.norm(&name("input_layernorm"), hidden)?,
            qkv: self.body(&[(&wq, q), (&wk, kv), (&wv, kv)], hidden)?,
            attn_sub_norm: self.sub_norm(&name("self_attn.attn_sub_norm"), q)?,
            output: self.body(&[(&name("self_attn.o_proj"), hidden)], q)?,
            post_attention_norm: self.norm(&name("post_attention_layernorm"), hidden)?,
            gate_up: self.body(&[(&gate, intermediate), (&up, intermediate)], hidden)?,
            ffn_sub_norm: self.sub_norm(&name("mlp.ffn_sub_norm"), intermediate)?,
            down: self.body(&[(&name("mlp.down_proj"), hidden)], intermediate)?,
        })
    }

    /// Matrices of the body, (name, output width) each, that share an input of `cols`.
    fn body(&mut self, parts: &[(&str, usize)], cols: usize) -> Result<B::Linear> {
        let source = |&(name, rows): &(&str, usize)| match self.config.ternary {
            Some(storage) => self.tensors.ternary(name, rows, cols, storage),
            None => self.float_source(name, rows, cols),
        };
        let stack = parts.iter().map(source).collect::<Result<Vec<_>>>()?;
        self.linear(&stack)
    }

    /// A matrix that stays float in every architecture: embedding and head.
    fn float(&mut self, name: &str, rows: usize, cols: usize) -> Result<B::Linear> {
        let source = self.float_source(name, rows, cols)?;
        self.linear(&[source])
    }

    fn float_source(&self, name: &str, rows: usize, cols: usize) -> Result<MatrixSource> {
        let source = self.tensors.matrix(&format!("{name}.weight"), rows, cols)?;
        Ok(match self.weights {
            WeightFormat::Stored => source,
            WeightFormat::Q8 => source.into_q8(),
            WeightFormat::Q4 => source.into_q4(),
        })
    }

    fn linear(&mut self, stack: &[MatrixSource]) -> Result<B::Linear> {
        // Parts of a stack may be stored in different float formats; then each is brought to f32,
        // which holds every one of them.
        let format = stack[0].format();
        let linear = if stack.iter().all(|part| part.format() == format) {
            self.backend.linear(stack)?
        } else {
            let widened: Vec<_> = stack.iter().cloned().map(MatrixSource::into_f32).collect();
            debug_assert!(widened.iter().all(|part| part.format() == MatrixFormat::F32));
            self.backend.linear(&widened)?
        };
        for part in stack {
            self.advance(part.name())?;
        }
        Ok(linear)
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<B::Norm> {
        let name = format!("{name}.weight");
        let weight = self.tensors.vector(&name, width)?;
        self.advance(&name)?;
        self.backend.norm(&weight, self.config.norm_eps)
    }

    fn sub_norm(&mut self, name: &str, width: usize) -> Result<Option<B::Norm>> {
        match self.config.ternary {
            Some(_) => self.norm(name, width).map(Some),
            None => Ok(None),
        }
    }

    fn advance(&mut self, name: &str) -> Result<()> {
        let bytes = self.tensors.get(name).map_or(0, |info| info.bytes);
        self.done.bytes += bytes as u64;
        match (self.progress)(self.done) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }

    /// Scales and tensors that no layer reads count as done too.
    fn finish(&mut self) -> Result<()> {
        self.done.bytes = self.done.total;
        match (self.progress)(self.done) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::AttentionPolicy;
    use crate::gpu::{Gpu, GpuOptions, Select};
    use crate::model::Engine;
    use crate::sampler::{SampleStep, TokenSet};

    /// What is not announced is found by a user who waits for it.
    #[test]
    fn a_session_needs_no_kernel_that_was_not_announced() {
        // A self-test asks for more than a session: also what gives all logits.
        let select = Select::Named(String::new());
        let options = GpuOptions { select, self_test: false, ..GpuOptions::default() };
        let (stored, q4) = (WeightFormat::Stored, WeightFormat::Q4);
        let models = [("bitnet-64", stored), ("llama-64", stored), ("llama-80", stored)];
        for (model, weights) in models.into_iter().chain([("llama-80", q4), ("bitnet-80", q4)]) {
            let dir = format!("{}/tests/fixtures/{model}", env!("CARGO_MANIFEST_DIR"));
            let checkpoint = Checkpoint::open(dir).expect("a fixture");
            let gpu = Gpu::open(&options).expect("an adapter");
            let keep_on = &mut |_| ControlFlow::Continue(());
            let model = Transformer::load(gpu.clone(), &checkpoint, weights, keep_on);
            let model = Arc::new(model.expect("it loads"));
            let seen = TokenSet::new(checkpoint.config.vocabulary);
            for policy in [AttentionPolicy::dense(), AttentionPolicy::delta()] {
                let shape = SessionShape::new(checkpoint.config.context, policy);
                let mut run = Arc::clone(&model).start(shape).expect("a session");
                for top_k in [1, 40] {
                    let step = SampleStep {
                        temperature: 1.0,
                        top_k,
                        top_p: 0.9,
                        min_p: 0.0,
                        repetition_penalty: 1.0,
                        seen: &seen,
                        draw: 0.5,
                    };
                    let phase = Phase::Prefill { length: 150 };
                    run.forward(Input::Tokens(&[5; 150]), phase, Output::Sample(&step))
                        .expect("a prompt");
                    run.forward(Input::Sampled, Phase::Decode, Output::Sample(&step))
                        .expect("a token");
                    run.token().expect("the first token");
                    run.token().expect("the second token");
                    run.truncate(0);
                }
            }
            assert_eq!(gpu.missed_kernels(), [""; 0]);
        }
    }
}
