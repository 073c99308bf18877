//! What the tests of compressed keys share: a text over one cache.

use deltallm::backend::{
    AttentionShape, Backend, CacheShape, Input, KeyValueCache, Operations, Step, StreamShape,
    TensorFormat,
};
use deltallm::delta::{AttentionPolicy, CacheImage, Page, Phase};

/// Queries, keys and values of a text, which nothing turns.
#[derive(Clone, Debug)]
pub struct Text {
    pub shape: AttentionShape,
    pub policy: AttentionPolicy,
    /// Tokens of the largest step that its cache is made for.
    pub rows: usize,
    /// `[tokens, (H + 2 G) D]`.
    pub qkv: Vec<f32>,
}

impl Text {
    pub fn tokens(&self) -> usize {
        self.qkv.len() / self.shape.qkv_width()
    }
}

/// What a text gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Attended {
    /// `[tokens, H D]`.
    pub attention: Vec<f32>,
    /// `[G][full pages]`.
    pub pages: Vec<Vec<Page>>,
    /// All that was in the cache.
    pub image: CacheImage,
    /// Bytes that the cache held for its keys.
    pub key_bytes: u64,
}

/// Runs a text in steps of the sizes given, which add up to its tokens.
pub fn attend<B: Backend>(backend: &B, text: &Text, steps: &[usize], phase: Phase) -> Attended {
    attend_from(backend, text, None, steps, phase)
}

/// The same for the tokens after those of an image, if there is one.
pub fn attend_from<B: Backend>(
    backend: &B,
    text: &Text,
    image: Option<&CacheImage>,
    steps: &[usize],
    phase: Phase,
) -> Attended {
    let Text { shape: attention, policy, rows, .. } = *text;
    let context = text.tokens() + 1;
    let shape = CacheShape { attention, context, rows, policy, thresholds: None };
    let stream = StreamShape { rows, context, attention, vocabulary: 32 };
    let mut stream = backend.stream(&stream).expect("a stream");
    let mut cache = backend.cache(&shape).expect("a cache");
    let tensor = |width| backend.tensor(rows, width, TensorFormat::F32).expect("a tensor");
    let (mut qkv, mut out) = (tensor(attention.qkv_width()), tensor(attention.width()));
    let still = vec![[1.0, 0.0]; context * attention.head_dim / 2];
    let rope = backend.rope(&still, attention.head_dim).expect("a table");

    let (mut length, mut exact_from) = (0, 0);
    if let Some(image) = image {
        stream.restore(&mut cache, image).expect("restored");
        (length, exact_from) = (image.length, image.exact_from);
    }
    let mut found = Vec::new();
    for &step in steps {
        let width = attention.qkv_width();
        backend.write(&mut qkv, &text.qkv[length * width..][..step * width]).expect("written");
        let tokens = vec![0; step];
        stream
            .begin(&Step { input: Input::Tokens(&tokens), position: length, phase })
            .expect("begun");
        stream.rope_append(&mut qkv, &rope, &mut cache).expect("appended");
        stream.encode_keys(&mut cache).expect("encoded");
        stream.attention(&qkv, &cache, &mut out).expect("attended");
        stream.submit().expect("submitted");
        found.extend(stream.read(&out).expect("read"));
        length += step;
    }
    if !policy.is_dense() {
        exact_from = exact_from.max(length.saturating_sub(policy.recent_slots(context, rows)));
    }
    Attended {
        attention: found,
        pages: stream.pages(&cache).expect("pages"),
        image: stream.save(&cache, exact_from).expect("saved"),
        key_bytes: cache.held().keys,
    }
}
