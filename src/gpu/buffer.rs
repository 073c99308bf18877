//! Device buffers that are counted while they live.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A device buffer; its bytes count as held until it is dropped.
pub(super) struct Buffer {
    raw: wgpu::Buffer,
    /// Unlike any other buffer of this process: what bind groups are cached by.
    id: u64,
    size: u64,
    held: Arc<AtomicU64>,
}

impl Buffer {
    pub(super) fn new(raw: wgpu::Buffer, size: u64, held: Arc<AtomicU64>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        held.fetch_add(size, Ordering::Relaxed);
        Self { raw, id: NEXT.fetch_add(1, Ordering::Relaxed), size, held }
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        &self.raw
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Bytes, padding included.
    pub(super) fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.held.fetch_sub(self.size, Ordering::Relaxed);
    }
}
