//! What the attention of each layer sees, taken from a dense run.

use super::{Model, PREFILL_CHUNK, SessionShape};
use crate::delta::{AttentionPolicy, CacheImage, LayerTrace, Phase};
use crate::error::{Error, Result};
use crate::formats::{AttentionShape, CacheFormat};
use crate::session::{Cancel, check_fits};

impl Model {
    /// Runs `ids` as one prompt with dense attention in `f32`, and gives each layer's rotated
    /// queries and keys, and its values: what [`crate::delta`] compresses, for analyses on the host.
    ///
    /// Host memory of `4 (H + 2 G) D` bytes a token and layer is needed. `progress` is told how
    /// many tokens have been run.
    ///
    /// # Errors
    /// A token outside the vocabulary, no token, more than the model's context;
    /// [`Error::Cancelled`]; a fault of the device.
    pub fn probe(
        &self,
        ids: &[u32],
        cancel: &Cancel,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<LayerTrace>> {
        let config = self.config();
        let (shape, vocabulary) = (config.attention, config.vocabulary);
        let limit = config.context;
        check_fits(ids.len(), limit, limit)?;
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&token) = ids.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::TokenOutOfRange { token, vocabulary });
        }
        let policy = AttentionPolicy::plain(CacheFormat::F32);
        let mut decoder = self.start(SessionShape::new(ids.len(), policy))?;
        decoder.cancel_with(cancel);
        let mut queries = vec![Vec::new(); config.layers];
        let phase = Phase::Prefill { length: ids.len() };
        for chunk in ids.chunks(PREFILL_CHUNK) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let before = decoder.length() * shape.width();
            decoder.probe(chunk, phase, &mut |layer, qkv| {
                // The layer may have come before, on a device that was lost.
                queries[layer].truncate(before);
                for row in qkv.chunks_exact(shape.qkv_width()) {
                    queries[layer].extend_from_slice(&row[..shape.width()]);
                }
                Ok(())
            })?;
            progress(decoder.length());
        }
        let mut traces = Vec::with_capacity(queries.len());
        for (layer, queries) in queries.into_iter().enumerate() {
            let CacheImage { exact, values, .. } = decoder.save(layer)?;
            let (keys, values) = (by_token(&exact, &shape), by_token(&values, &shape));
            let trace = LayerTrace { shape, queries, keys, values };
            for (what, part) in
                [("queries", &trace.queries), ("keys", &trace.keys), ("values", &trace.values)]
            {
                if part.iter().any(|x| !x.is_finite()) {
                    return Err(Error::NotFinite { what: format!("the {what} of layer {layer}") });
                }
            }
            traces.push(trace);
        }
        Ok(traces)
    }
}

/// Floats `[G, T, D]` as bytes to `[T, G, D]`.
fn by_token(bytes: &[u8], shape: &AttentionShape) -> Vec<f32> {
    let AttentionShape { kv_heads, head_dim, .. } = *shape;
    let tokens = bytes.len() / (4 * shape.kv_width());
    let float = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let mut out = Vec::with_capacity(bytes.len() / 4);
    for token in 0..tokens {
        for head in 0..kv_heads {
            let at = 4 * head_dim * (head * tokens + token);
            out.extend(bytes[at..at + 4 * head_dim].chunks_exact(4).map(float));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_interleaved() {
        let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 2 };
        let heads: Vec<u8> = (0..12).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let expected = [0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 8.0, 9.0, 4.0, 5.0, 10.0, 11.0];
        assert_eq!(by_token(&heads, &shape), expected);
    }
}
