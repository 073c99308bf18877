//! What is particular to GPUs: large sizes, buffers in pieces, what is made once, and failures.

mod gpu_common;

use std::sync::Arc;

use deltallm::Error;
use deltallm::backend::{
    AttentionShape, Backend, CacheShape, Footprint, Input, Operations, Step, StreamShape,
    TensorFormat,
};
use deltallm::checkpoint::{FloatType, MatrixSource};
use deltallm::delta::{AttentionPolicy, Phase};
use deltallm::gpu::{Gpu, GpuOptions, Packing, Select, Tuning, Tunings};
use deltallm::reference::Reference;
use deltallm::sampler::{Draws, SampleStep, TokenSet};
use gpu_common::{any, open};

/// Uniform numbers in [-1, 1).
fn floats(seed: u64, count: usize) -> Vec<f32> {
    let mut draws = Draws::new(seed);
    (0..count).map(|_| 2.0 * draws.draw() - 1.0).collect()
}

fn float_matrix(rows: usize, cols: usize, seed: u64) -> MatrixSource {
    let bytes: Vec<u8> = floats(seed, rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect();
    MatrixSource::float("test", rows, cols, FloatType::F32, bytes.into())
}

fn ternary_matrix(rows: usize, cols: usize, seed: u64) -> MatrixSource {
    let mut draws = Draws::new(seed);
    let mut field = || (draws.draw() * 3.0) as u8;
    let byte = |_| field() | field() << 2 | field() << 4 | field() << 6;
    let bytes: Vec<u8> = (0..rows.div_ceil(4) * cols).map(byte).collect();
    MatrixSource::packed("test", rows, cols, bytes.into(), 0.75)
}

fn stream_shape(rows: usize, context: usize, vocabulary: usize) -> StreamShape {
    let attention = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16 };
    StreamShape { rows, context, attention, vocabulary }
}

#[track_caller]
fn assert_near(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "element {i}: {got} instead of {want}");
    }
}

fn cache_shape(attention: AttentionShape, context: usize) -> CacheShape {
    CacheShape {
        attention,
        context,
        rows: 4096.min(context),
        policy: AttentionPolicy::dense(),
        thresholds: None,
    }
}

/// Decoding `tokens` from `position` on.
fn step_of(tokens: &[u32], position: usize) -> Step<'_> {
    Step { input: Input::Tokens(tokens), position, phase: Phase::Decode }
}

/// Fills a cache with `keys` tokens, then attends from `rows` more.
fn attend<B: Backend>(backend: &B, keys: usize, rows: usize) -> Vec<f32> {
    let chunk = 4096;
    let context = keys + rows;
    let shape = stream_shape(chunk.max(rows), context, 32);
    let (width, head_dim) = (shape.attention.qkv_width(), shape.attention.head_dim);
    let mut stream = backend.stream(&shape).unwrap();
    let table = vec![[1.0, 0.0]; context * head_dim / 2];
    let rope = backend.rope(&table, head_dim).unwrap();
    let mut cache = backend.cache(&cache_shape(shape.attention, context)).unwrap();
    let mut qkv = backend.tensor(shape.rows, width, TensorFormat::F32).unwrap();
    let mut out = backend.tensor(shape.rows, shape.attention.width(), TensorFormat::F32).unwrap();
    let mut position = 0;
    while position < context {
        let last = position >= keys;
        let count = if last { rows } else { chunk.min(keys - position) };
        backend.write(&mut qkv, &floats(position as u64, count * width)).unwrap();
        stream.begin(&step_of(&vec![0; count], position)).unwrap();
        stream.rope_append(&mut qkv, &rope, &mut cache).unwrap();
        if last {
            stream.attention(&qkv, &cache, &mut out).unwrap();
        }
        stream.submit().unwrap();
        position += count;
    }
    stream.read(&out).unwrap()
}

/// Keys in several dispatches and in many spans. Mesa's llvmpipe 22.3 silently ends loops after
/// 65535 iterations, which one invocation for all keys would reach.
#[test]
fn attention_over_a_long_context() {
    let gpu = open(any());
    for (keys, rows) in [(8300, 1), (8300, 3), (8190, 40), (70_000, 1), (70_000, 6)] {
        let want = attend(&Reference::new(), keys, rows);
        assert_near(&attend(&gpu, keys, rows), &want, 2e-6);
    }
}

fn product<B: Backend>(backend: &B, weight: &MatrixSource, rows: usize, ternary: bool) -> Vec<f32> {
    let (out, cols) = (weight.rows(), weight.cols());
    let weight = backend.linear(std::slice::from_ref(weight)).unwrap();
    let mut x = if ternary {
        let mut x = backend.tensor(rows, cols, TensorFormat::Int8).unwrap();
        let values: Vec<i8> = floats(5, rows * cols).iter().map(|x| (x * 127.9) as i8).collect();
        backend.write_int8(&mut x, &values, &vec![0.125; rows]).unwrap();
        x
    } else {
        let mut x = backend.tensor(rows, cols, TensorFormat::F32).unwrap();
        backend.write(&mut x, &floats(5, rows * cols)).unwrap();
        x
    };
    let mut y = backend.tensor(rows, out, TensorFormat::F32).unwrap();
    let mut stream = backend.stream(&stream_shape(rows, rows, 32)).unwrap();
    stream.begin(&step_of(&vec![0; rows], 0)).unwrap();
    stream.linear(&x, &weight, &mut y).unwrap();
    // The input is not written twice.
    std::mem::swap(&mut x, &mut y);
    stream.submit().unwrap();
    stream.read(&x).unwrap()
}

#[test]
fn linear_with_wide_rows() {
    let gpu = open(any());
    for rows in [1, 5, 70] {
        let weight = ternary_matrix(12, 16384, 7);
        let want = product(&Reference::new(), &weight, rows, true);
        assert_eq!(product(&gpu, &weight, rows, true), want, "ternary, {rows} rows");
        let weight = float_matrix(9, 16384, 8);
        let want = product(&Reference::new(), &weight, rows, false);
        assert_near(&product(&gpu, &weight, rows, false), &want, 2e-3);
    }
}

/// A device whose ternary weights are packed like this.
fn packed(packing: Packing, options: GpuOptions) -> Gpu {
    let device = open(options.clone()).device().clone();
    let mut tunings = Tunings::default();
    tunings.insert(&device, Tuning { packing, ..Tuning::default_of(device.kind) });
    open(GpuOptions { tunings, ..options })
}

#[test]
fn ternary_matrices_in_pieces_are_exact() {
    for packing in Packing::ALL {
        let gpu = packed(packing, GpuOptions { max_matrix_block: Some(1 << 10), ..any() });
        for rows in [1, 33] {
            let weight = ternary_matrix(133, 100, 9);
            let want = product(&Reference::new(), &weight, rows, true);
            assert_eq!(product(&gpu, &weight, rows, true), want, "{packing}, {rows} rows");
        }
    }
}

/// More than is encoded at a time, so that a matrix goes to the device in several pieces.
#[test]
fn large_ternary_matrices_are_exact() {
    let weight = ternary_matrix(20_003, 2560, 11);
    let want = product(&Reference::new(), &weight, 1, true);
    for packing in Packing::ALL {
        assert_eq!(product(&packed(packing, any()), &weight, 1, true), want, "{packing}");
    }
}

#[test]
fn five_weights_in_a_byte_take_a_fifth_less() {
    let weight = [ternary_matrix(200, 64, 3), ternary_matrix(41, 64, 4)];
    let bytes = |packing| packed(packing, any()).linear(&weight).unwrap().bytes();
    // With a table of four matrices.
    assert_eq!(bytes(Packing::Four), (50 + 11) * 64 + 128);
    assert_eq!(bytes(Packing::Five), (40 + 9) * 64 + 128);
}

/// A third bit pattern too many has no digit; the reader of files refuses it before.
#[test]
fn what_is_no_trit_is_refused_where_it_cannot_be_packed() {
    let weight = MatrixSource::packed("odd", 4, 16, vec![0xff; 16].into(), 1.0);
    let error = packed(Packing::Five, any()).linear(&[weight]).err().expect("no trits").to_string();
    assert!(error.contains("odd") && error.contains("trits"), "{error}");
}

fn sampled<B: Backend>(backend: &B, logits: &[f32], step: &SampleStep<'_>) -> Result<u32, Error> {
    let mut tensor = backend.tensor(2, logits.len() / 2, TensorFormat::F32)?;
    backend.write(&mut tensor, logits)?;
    let mut stream = backend.stream(&stream_shape(2, 2, logits.len() / 2))?;
    stream.begin(&step_of(&[0, 0], 0))?;
    stream.sample(&tensor, step)?;
    stream.submit()?;
    stream.token()
}

#[test]
fn sampling_from_a_large_vocabulary() {
    let gpu = open(any());
    let vocabulary = 128_256;
    let mut logits: Vec<f32> = floats(3, 2 * vocabulary).iter().map(|x| x * 12.0).collect();
    // The best tokens of the last row, two of them equal.
    logits[vocabulary + 100_000] = 14.0;
    logits[vocabulary + 70_001] = 14.0;
    logits[vocabulary + 5] = 13.5;
    let mut seen = TokenSet::new(vocabulary);
    seen.insert(70_001);
    for (top_k, penalty) in [(1, 1.0), (1, 1.3), (40, 1.0), (200, 1.1), (256, 1.0)] {
        for draw in [0.0, 0.3, 0.6, 0.9, 0.999] {
            let step = SampleStep {
                temperature: 0.8,
                top_k,
                top_p: 0.95,
                min_p: 0.01,
                repetition_penalty: penalty,
                seen: &seen,
                draw,
            };
            let want = sampled(&Reference::new(), &logits, &step).unwrap();
            assert_eq!(sampled(&gpu, &logits, &step).unwrap(), want, "top_k {top_k}, {draw}");
        }
    }
}

#[test]
fn tensors_of_odd_sizes_come_back_as_written() {
    let gpu = open(any());
    let mut stream = gpu.stream(&stream_shape(8, 8, 32)).unwrap();
    for (rows, width) in [(1, 1), (3, 5), (2, 16), (8, 31), (5, 33), (1, 2560)] {
        let values = floats(1, rows * width);
        let mut tensor = gpu.tensor(8, width, TensorFormat::F32).unwrap();
        assert!(stream.read(&tensor).unwrap().is_empty());
        gpu.write(&mut tensor, &values).unwrap();
        assert_eq!(stream.read(&tensor).unwrap(), values);
        let bytes: Vec<i8> = values.iter().map(|x| (x * 127.0) as i8).collect();
        let scales = floats(2, rows);
        let mut tensor = gpu.tensor(8, width, TensorFormat::Int8).unwrap();
        gpu.write_int8(&mut tensor, &bytes, &scales).unwrap();
        assert_eq!(stream.read_int8(&tensor).unwrap(), (bytes, scales));
    }
}

/// NaN must not vanish in the quantiser: silent wrong output is the worst failure.
#[test]
fn nan_passes_through_the_quantiser() {
    let gpu = open(any());
    let mut values = floats(1, 3 * 100);
    values[150] = f32::NAN;
    let mut x = gpu.tensor(3, 100, TensorFormat::F32).unwrap();
    gpu.write(&mut x, &values).unwrap();
    let norm = gpu.norm(&[1.0; 100], 1e-5).unwrap();
    let mut out = gpu.tensor(3, 100, TensorFormat::Int8).unwrap();
    let mut stream = gpu.stream(&stream_shape(3, 3, 32)).unwrap();
    stream.norm(&x, 0..3, &norm, &mut out).unwrap();
    let (_, scales) = stream.read_int8(&out).unwrap();
    assert_eq!(scales.iter().map(|s| s.is_nan()).collect::<Vec<_>>(), [false, true, false]);
}

/// A step like a decoder's: what a warm stream makes anew is nothing.
#[test]
fn a_warm_stream_makes_nothing_anew() {
    let gpu = open(any());
    let vocabulary = 500;
    let shape = stream_shape(8, 64, vocabulary);
    let attention = shape.attention;
    let hidden = attention.width();
    let mut stream = gpu.stream(&shape).unwrap();
    let table = gpu.linear(&[float_matrix(vocabulary, hidden, 1)]).unwrap();
    let qkv_weight = gpu.linear(&[float_matrix(attention.qkv_width(), hidden, 2)]).unwrap();
    let norm = gpu.norm(&vec![1.0; hidden], 1e-5).unwrap();
    let rope = gpu.rope(&vec![[1.0, 0.0]; 64 * 8], 16).unwrap();
    let mut cache = gpu.cache(&cache_shape(attention, 64)).unwrap();
    let tensor = |width| gpu.tensor(8, width, TensorFormat::F32).unwrap();
    let (mut x, mut normed, mut heads) = (tensor(hidden), tensor(hidden), tensor(hidden));
    let (mut qkv, mut logits) = (tensor(attention.qkv_width()), tensor(vocabulary));
    let seen = TokenSet::new(vocabulary);
    let mut step = |tokens: &[u32], position, draw| {
        stream.begin(&step_of(tokens, position)).unwrap();
        stream.embed(&table, &mut x).unwrap();
        let rows = 0..tokens.len();
        stream.norm(&x, rows, &norm, &mut normed).unwrap();
        stream.linear(&normed, &qkv_weight, &mut qkv).unwrap();
        stream.rope_append(&mut qkv, &rope, &mut cache).unwrap();
        stream.attention(&qkv, &cache, &mut heads).unwrap();
        stream.linear(&heads, &table, &mut logits).unwrap();
        let sample = SampleStep {
            temperature: 1.0,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.0,
            repetition_penalty: 1.2,
            seen: &seen,
            draw,
        };
        stream.sample(&logits, &sample).unwrap();
        stream.submit().unwrap();
        stream.token().unwrap();
        stream.counters()
    };
    step(&[1, 2, 3, 4, 5, 6], 0, 0.5);
    let warm = step(&[7], 6, 0.1);
    let held = gpu.bytes();
    let mut last = warm;
    for position in 7..50 {
        last = step(&[position as u32], position, position as f32 / 50.0);
    }
    assert_eq!(last.bind_groups, warm.bind_groups);
    assert_eq!(last.pipelines, warm.pipelines);
    assert_eq!(last.readbacks, warm.readbacks);
    assert_eq!(last.submissions, warm.submissions + 43);
    assert_eq!(gpu.bytes(), held);
}

#[test]
fn memory_is_counted_and_given_back() {
    let gpu = open(any());
    assert_eq!(gpu.bytes(), 0);
    let weight = gpu.linear(&[float_matrix(1000, 100, 1)]).unwrap();
    let tensor = gpu.tensor(10, 100, TensorFormat::Int8).unwrap();
    assert_eq!(weight.bytes(), 1000 * 112 * 4);
    assert_eq!(tensor.bytes(), 10 * 112 + 10 * 8);
    assert_eq!(gpu.bytes(), weight.bytes() + tensor.bytes());
    drop((weight, tensor));
    assert_eq!(gpu.bytes(), 0);
}

#[test]
fn a_buffer_over_the_limits_is_refused_with_figures() {
    let gpu = open(GpuOptions { floor_limits: true, ..any() });
    match gpu.tensor(1 << 16, 1 << 10, TensorFormat::F32) {
        Err(Error::DeviceLimit { needed, limit, .. }) => {
            assert_eq!((needed, limit), (1 << 28, 128 << 20));
        }
        other => panic!("{:?}", other.err()),
    }
    // The device is as good as before.
    let weight = float_matrix(3, 8, 1);
    assert_eq!(product(&gpu, &weight, 1, false).len(), 3);
}

/// Several steps on their way, more than once around the ring of what is read back.
#[test]
fn tokens_come_in_order_and_nan_is_told_in_its_place() {
    let (gpu, vocabulary) = (open(any()), 40);
    let logits = |best: usize, value: f32| {
        let mut tensor = gpu.tensor(1, vocabulary, TensorFormat::F32).unwrap();
        let mut logits = vec![0.0; vocabulary];
        logits[best] = value;
        gpu.write(&mut tensor, &logits).unwrap();
        tensor
    };
    let (five, nan, seven) = (logits(5, 2.0), logits(1, f32::NAN), logits(7, 3.0));
    let seen = TokenSet::new(vocabulary);
    let step = SampleStep {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seen: &seen,
        draw: 0.5,
    };
    let mut stream = gpu.stream(&stream_shape(2, 8, vocabulary)).unwrap();
    let sampled = |position| Step { input: Input::Sampled, position, phase: Phase::Decode };
    assert!(stream.begin(&sampled(0)).is_err(), "nothing was sampled");
    for _ in 0..3 {
        for (position, logits) in [&five, &nan, &seven].into_iter().enumerate() {
            match position {
                0 => stream.begin(&step_of(&[1], position)).unwrap(),
                _ => stream.begin(&sampled(position)).unwrap(),
            }
            stream.sample(logits, &step).unwrap();
            stream.submit().unwrap();
        }
        assert_eq!(stream.token().unwrap(), 5);
        assert!(matches!(stream.token(), Err(Error::NotFinite { .. })));
        assert_eq!(stream.token().unwrap(), 7);
        assert!(matches!(stream.token(), Err(Error::Device { .. })), "all were read");
    }
    stream.begin(&step_of(&[1], 0)).unwrap();
    let taken = (0..9).take_while(|_| stream.sample(&five, &step).is_ok()).count();
    assert_eq!(taken, 4, "a host that never reads is told");
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let gpu = open(any());
    let mut stream = gpu.stream(&stream_shape(4, 8, 32)).unwrap();
    let weight = gpu.linear(&[ternary_matrix(8, 16, 1)]).unwrap();
    let mut x = gpu.tensor(2, 16, TensorFormat::F32).unwrap();
    let mut out = gpu.tensor(2, 8, TensorFormat::F32).unwrap();
    gpu.write(&mut x, &[0.0; 32]).unwrap();
    assert!(matches!(stream.linear(&x, &weight, &mut out), Err(Error::Device { .. })));
    assert!(stream.begin(&step_of(&[0; 5], 0)).is_err());
    assert!(stream.begin(&step_of(&[0; 4], 5)).is_err());
    assert!(stream.token().is_err());
    assert!(gpu.write(&mut x, &[0.0; 33]).is_err());
}

#[test]
fn a_lost_device_is_reported_as_lost() {
    let gpu = open(any());
    let mut x = gpu.tensor(2, 16, TensorFormat::F32).unwrap();
    let mut stream = gpu.stream(&stream_shape(4, 8, 32)).unwrap();
    gpu.write(&mut x, &[0.0; 32]).unwrap();
    gpu.lose();
    let read = stream.read(&x);
    assert!(matches!(read, Err(Error::DeviceLost { .. })), "{read:?}");
    let again = stream.begin(&step_of(&[0], 0));
    assert!(matches!(again, Err(Error::DeviceLost { .. })), "{again:?}");
    // Another device can be opened in its place.
    drop((x, stream, gpu));
    assert_eq!(product(&open(any()), &float_matrix(3, 8, 1), 1, false).len(), 3);
}

#[test]
fn an_adapter_that_is_not_there_is_named_with_those_that_are() {
    let name = "no such adapter".to_owned();
    match Gpu::open(&GpuOptions { select: Select::Named(name.clone()), ..GpuOptions::default() }) {
        Err(Error::NoAdapter { wanted, found }) => {
            assert!(wanted.contains(&name), "{wanted}");
            assert_eq!(found.len(), deltallm::gpu::adapters().len());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn sessions_on_several_threads_share_a_device() {
    let gpu = Arc::new(open(any()));
    let want = attend(&Reference::new(), 50, 3);
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let gpu = Arc::clone(&gpu);
            std::thread::spawn(move || attend(&*gpu, 50, 3))
        })
        .collect();
    for thread in threads {
        assert_near(&thread.join().unwrap(), &want, 2e-6);
    }
}
