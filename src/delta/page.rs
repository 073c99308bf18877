//! The bits of a compressed page of keys.

use half::f16;

use super::policy::{AttentionPolicy, DeltaFormat, DeltaKeys, KeyFormat, Reference};
use crate::error::{Error, Result};

/// Where things lie in a page: in 32-bit words, so that a shader can read them.
///
/// `C` are the tokens of a page, `D` the elements of a head, `M = ceil(D / 32)`. Pairs and bytes
/// begin with the lowest bits of a word. A page is a header of fixed size, and for
/// [`KeyFormat::Delta`] the deltas behind it, whose number differs from page to page:
///
/// | format | header |
/// |---|---|
/// | `Int8` | scales `[C]` f16; levels `[C][ceil(D / 4)]` words of `i8` |
/// | `Channel` | (scale, minimum) `[D]` pairs of f16; levels `[C][ceil(D bits / 32)]` words |
/// | `Delta` | reference `[D]` f16; scales `[D]` f16, not for f16 deltas; mask `[C][M]` words, bit `c % 32` of word `c / 32` for a kept channel; deltas before each token `[C]` u16; their number; theta, f32; where the deltas begin, in words |
///
/// The deltas are those of the first token in the order of its channels, then those of the second,
/// and so on, packed without gaps in 16, 8 or 4 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageLayout {
    /// How keys are kept; not [`KeyFormat::Plain`].
    pub keys: KeyFormat,
    /// Tokens of a page, `C`.
    pub tokens: usize,
    /// Elements of a head, `D`.
    pub head_dim: usize,
}

impl PageLayout {
    /// The layout of a policy's pages; `None` where keys are plain.
    ///
    /// # Errors
    /// [`Error::Parameter`] where pages of such heads are too large to index.
    pub fn new(policy: &AttentionPolicy, head_dim: usize) -> Result<Option<Self>> {
        if policy.is_dense() {
            return Ok(None);
        }
        if policy.page * head_dim > usize::from(u16::MAX) {
            return Err(Error::Parameter {
                name: "page",
                value: policy.page.to_string(),
                allowed: format!(
                    "pages of heads of {head_dim} elements must have at most {} tokens",
                    usize::from(u16::MAX) / head_dim
                ),
            });
        }
        Ok(Some(Self { keys: policy.keys, tokens: policy.page, head_dim }))
    }

    /// The delta format; `None` for quantised keys.
    pub fn delta(&self) -> Option<DeltaKeys> {
        match self.keys {
            KeyFormat::Delta(delta) => Some(delta),
            _ => None,
        }
    }

    /// Mask words of a token, `M`.
    pub fn mask_words(&self) -> usize {
        self.head_dim.div_ceil(32)
    }

    /// Where the scales lie: of tokens (`Int8`), of channels with their minima (`Channel`), of
    /// channels (`Delta`).
    pub fn scales(&self) -> usize {
        match self.keys {
            KeyFormat::Delta(_) => self.head_dim / 2,
            _ => 0,
        }
    }

    /// Where the levels of quantised keys lie.
    pub fn levels(&self) -> usize {
        match self.keys {
            KeyFormat::Int8 => self.tokens / 2,
            _ => self.head_dim,
        }
    }

    /// Words of a token's levels, for quantised keys.
    pub fn level_words(&self) -> usize {
        match self.keys {
            KeyFormat::Int8 => self.head_dim.div_ceil(4),
            KeyFormat::Channel(bits) => (self.head_dim * bits.bits()).div_ceil(32),
            KeyFormat::Plain | KeyFormat::Delta(_) => 0,
        }
    }

    /// Where the masks of a delta page lie.
    pub fn masks(&self) -> usize {
        match self.keys {
            KeyFormat::Delta(DeltaKeys { deltas: DeltaFormat::F16, .. }) => self.head_dim / 2,
            _ => self.head_dim,
        }
    }

    /// Where the numbers of deltas before each token lie.
    pub fn offsets(&self) -> usize {
        self.masks() + self.tokens * self.mask_words()
    }

    /// Where the number of deltas lies; theta follows, then where the deltas begin.
    pub fn total(&self) -> usize {
        self.offsets() + self.tokens / 2
    }

    /// Words of the header: for quantised keys, of the whole page.
    pub fn header_words(&self) -> usize {
        match self.keys {
            KeyFormat::Delta(_) => self.total() + 3,
            _ => self.levels() + self.tokens * self.level_words(),
        }
    }

    /// Words of so many deltas.
    pub fn delta_words(&self, deltas: usize) -> usize {
        self.delta().map_or(0, |delta| (deltas * delta.deltas.bits()).div_ceil(32))
    }

    /// Words of the largest page: one of which every delta is kept.
    pub fn max_words(&self) -> usize {
        self.header_words() + self.delta_words(self.tokens * self.head_dim)
    }
}

/// A compressed page of keys: the same words on every device.
///
/// In a page that stands alone the deltas follow the header; in a device's memory they may lie
/// elsewhere, which is what the header's last word is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// See [`PageLayout`].
    pub words: Box<[u32]>,
}

impl Page {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        size_of_val(&self.words[..]) as u64
    }

    /// Kept deltas of a delta page.
    pub fn deltas(&self, layout: &PageLayout) -> usize {
        self.words[layout.total()] as usize
    }

    /// The threshold that a delta page was encoded with.
    pub fn theta(&self, layout: &PageLayout) -> f32 {
        f32::from_bits(self.words[layout.total() + 1])
    }

    /// Whether channel `channel` of a delta page's token `token` is kept.
    pub fn is_kept(&self, layout: &PageLayout, token: usize, channel: usize) -> bool {
        let word = layout.masks() + token * layout.mask_words() + channel / 32;
        self.words[word] >> (channel % 32) & 1 == 1
    }

    /// Entry `index` of an array of f16 that begins at word `at`.
    fn half(&self, at: usize, index: usize) -> f32 {
        f16::from_bits((self.words[at + index / 2] >> (16 * (index % 2))) as u16).to_f32()
    }

    /// Entry `index` of an array of `bits`-wide fields that begins at word `at`.
    fn field(&self, at: usize, index: usize, bits: usize) -> u32 {
        let bit = index * bits;
        self.words[at + bit / 32] >> (bit % 32) & (u32::MAX >> (32 - bits))
    }

    /// The keys that the page stands for, `[C, D]`.
    ///
    /// # Panics
    /// Where the page is not of this layout, or is damaged; see [`Page::check`].
    pub fn reconstruct(&self, layout: &PageLayout) -> Vec<f32> {
        let PageLayout { keys, tokens, head_dim } = *layout;
        let mut out = vec![0.0; tokens * head_dim];
        match keys {
            KeyFormat::Plain => {}
            KeyFormat::Int8 => {
                for (token, row) in out.chunks_exact_mut(head_dim).enumerate() {
                    let scale = self.half(layout.scales(), token);
                    let at = layout.levels() + token * layout.level_words();
                    for (channel, key) in row.iter_mut().enumerate() {
                        *key = f32::from(self.field(at, channel, 8) as i8) * scale;
                    }
                }
            }
            KeyFormat::Channel(bits) => {
                for (token, row) in out.chunks_exact_mut(head_dim).enumerate() {
                    let at = layout.levels() + token * layout.level_words();
                    for (channel, key) in row.iter_mut().enumerate() {
                        let scale = self.half(0, 2 * channel);
                        let minimum = self.half(0, 2 * channel + 1);
                        let level = self.field(at, channel, bits.bits());
                        *key = level as f32 * scale + minimum;
                    }
                }
            }
            KeyFormat::Delta(delta) => {
                let deltas = layout.header_words();
                let mut row: Vec<f32> = (0..head_dim).map(|c| self.half(0, c)).collect();
                let reference = row.clone();
                let mut next = 0;
                for (token, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    if delta.reference == Reference::Mean {
                        row.copy_from_slice(&reference);
                    }
                    for (channel, key) in row.iter_mut().enumerate() {
                        if self.is_kept(layout, token, channel) {
                            let field = self.field(deltas, next, delta.deltas.bits());
                            let scale = |scales| self.half(scales, channel);
                            *key += match delta.deltas {
                                DeltaFormat::F16 => f16::from_bits(field as u16).to_f32(),
                                DeltaFormat::Int8 => {
                                    f32::from(field as i8) * scale(layout.scales())
                                }
                                // The sign is bit 3.
                                DeltaFormat::Int4 => {
                                    ((field << 28) as i32 >> 28) as f32 * scale(layout.scales())
                                }
                            };
                            next += 1;
                        }
                    }
                    out.copy_from_slice(&row);
                }
            }
        }
        out
    }

    /// Refuses a page that is not of this layout, or whose parts contradict each other.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn check(&self, layout: &PageLayout) -> std::result::Result<(), String> {
        let (words, header) = (self.words.len(), layout.header_words());
        if layout.delta().is_none() {
            let fits = words == header;
            return if fits { Ok(()) } else { Err(format!("{words} words instead of {header}")) };
        }
        if words < header {
            return Err(format!("{words} words, fewer than the {header} of a header"));
        }
        let mut before = 0;
        for token in 0..layout.tokens {
            let offset = self.field(layout.offsets(), token, 16) as usize;
            if offset != before {
                return Err(format!("token {token} begins at delta {offset}, not {before}"));
            }
            let mask = layout.masks() + token * layout.mask_words();
            let mask = &self.words[mask..mask + layout.mask_words()];
            let spare = layout.mask_words() * 32 - layout.head_dim;
            if mask[mask.len() - 1].leading_zeros() < spare as u32 {
                return Err(format!("token {token} keeps channels beyond {}", layout.head_dim));
            }
            before += mask.iter().map(|word| word.count_ones() as usize).sum::<usize>();
        }
        let deltas = self.deltas(layout);
        if deltas != before || words != header + layout.delta_words(deltas) {
            return Err(format!("{words} words and {before} kept channels for {deltas} deltas"));
        }
        Ok(())
    }
}
