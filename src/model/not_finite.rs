//! Where in a model a text first stops being numbers.
//!
//! That the logits hold NaN or infinity costs nothing to see: sampling looks at them anyway, and every
//! operation passes on what is not finite. Which layer it came from costs a run of the text, which only
//! who has lost the text already pays.

use super::transformer::{Activations, Run, Site};
use super::{Decoder, Output};
use crate::backend::{Backend, Input, Operations};
use crate::delta::Phase;
use crate::error::{Error, Result};
use crate::session::Cancel;

impl<B: Backend> Run<B> {
    /// Runs `tokens` from the beginning, and says in words what first held NaN or infinity; nothing
    /// where all is finite this time. The cache is empty then.
    ///
    /// # Errors
    /// [`Error::Cancelled`], a fault of the device.
    pub(super) fn find(&mut self, tokens: &[u32], cancel: &Cancel) -> Result<Option<String>> {
        self.truncate(0);
        let found = self.find_from_start(tokens, cancel);
        self.truncate(0);
        found
    }

    fn find_from_start(&mut self, tokens: &[u32], cancel: &Cancel) -> Result<Option<String>> {
        let phase = Phase::Prefill { length: tokens.len() };
        let mut first = 0;
        for chunk in tokens.chunks(self.chunk()) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let mut found = None;
            let output = Output::LastLogits;
            self.step(Input::Tokens(chunk), phase, output, |site, stream, activations| {
                if found.is_none() {
                    found = look::<B>(site, stream, activations)?;
                }
                Ok(())
            })?;
            if found.is_none() && self.logits()?.iter().any(|x| !x.is_finite()) {
                found = Some("the last norm or the output head".to_owned());
            }
            if let Some(what) = found {
                let last = first + chunk.len() - 1;
                return Ok(Some(format!("{what}, tokens {first} to {last}")));
            }
            first += chunk.len();
        }
        Ok(None)
    }
}

/// What of a layer is not finite, if anything is.
fn look<B: Backend>(
    site: Site,
    stream: &mut B::Stream,
    activations: &Activations<B>,
) -> Result<Option<String>> {
    let a = activations;
    let looked = match site {
        Site::Attention(0) => vec![
            ("the embedding".to_owned(), &a.hidden),
            ("the queries, keys or values of layer 0".to_owned(), &a.qkv),
            ("the attention of layer 0".to_owned(), &a.attended),
        ],
        Site::Attention(layer) => vec![
            (format!("the queries, keys or values of layer {layer}"), &a.qkv),
            (format!("the attention of layer {layer}"), &a.attended),
        ],
        Site::Layer(layer) => vec![
            (format!("the output, gate or up projection of layer {layer}"), &a.gate_up),
            (format!("the down projection of layer {layer}"), &a.hidden),
        ],
    };
    for (what, tensor) in looked {
        if stream.read(tensor)?.iter().any(|x| !x.is_finite()) {
            return Ok(Some(what));
        }
    }
    Ok(None)
}
