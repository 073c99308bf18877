//! Activations.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use crate::backend::{Footprint, TensorFormat};

/// A cache line, and the widest vector.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A slice of numbers that starts at a cache line, or every other vector would straddle two.
pub(super) struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    /// `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        Self { lines: vec![Line::zeroed(); lines], len, element: PhantomData }
    }

    /// Makes it at least `len` long; what it holds is then unspecified.
    pub(super) fn grow(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeros(len);
        }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        size_of_val(&self.lines[..]) as u64
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

/// Activations of up to `capacity` tokens, `[rows, width]`.
pub struct Tensor {
    rows: usize,
    width: usize,
    capacity: usize,
    elements: Elements,
}

enum Elements {
    F32(Aligned<f32>),
    Int8(Int8),
}

/// Quantised rows.
pub(super) struct Int8 {
    /// `[capacity, width]`.
    pub(super) values: Aligned<i8>,
    /// One a row: `x ~ value * scale`.
    pub(super) scales: Vec<f32>,
    /// One a row: the sum of its values. Ternary kernels count weights from 0, not from -1, and
    /// subtract it.
    pub(super) sums: Vec<i32>,
}

/// One row of a tensor that is being written.
pub(super) enum RowMut<'a> {
    /// `[width]`.
    F32(&'a mut [f32]),
    /// `[width]`, its scale and its sum.
    Int8(&'a mut [i8], &'a mut f32, &'a mut i32),
}

impl Tensor {
    pub(super) fn new(capacity: usize, width: usize, format: TensorFormat) -> Self {
        let elements = match format {
            TensorFormat::F32 => Elements::F32(Aligned::zeros(capacity * width)),
            TensorFormat::Int8 => Elements::Int8(Int8 {
                values: Aligned::zeros(capacity * width),
                scales: vec![0.0; capacity],
                sums: vec![0; capacity],
            }),
        };
        Self { rows: 0, width, capacity, elements }
    }

    /// Live rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Sets the number of live rows.
    pub(super) fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.capacity, "{rows} rows in a tensor of {}", self.capacity);
        self.rows = rows;
    }

    /// Live rows of an F32 tensor, `[rows, width]`.
    pub(super) fn floats(&self) -> &[f32] {
        match &self.elements {
            Elements::F32(values) => &values[..self.rows * self.width],
            Elements::Int8(_) => panic!("an F32 tensor is needed"),
        }
    }

    /// Live rows of an F32 tensor, `[rows, width]`.
    pub(super) fn floats_mut(&mut self) -> &mut [f32] {
        match &mut self.elements {
            Elements::F32(values) => &mut values[..self.rows * self.width],
            Elements::Int8(_) => panic!("an F32 tensor is needed"),
        }
    }

    /// Row `t` of an F32 tensor, `[width]`.
    pub(super) fn row(&self, t: usize) -> &[f32] {
        &self.floats()[t * self.width..][..self.width]
    }

    /// An Int8 tensor's elements, of all rows.
    pub(super) fn int8(&self) -> &Int8 {
        match &self.elements {
            Elements::Int8(int8) => int8,
            Elements::F32(_) => panic!("an Int8 tensor is needed"),
        }
    }

    /// An Int8 tensor's elements, of all rows.
    pub(super) fn int8_mut(&mut self) -> &mut Int8 {
        match &mut self.elements {
            Elements::Int8(int8) => int8,
            Elements::F32(_) => panic!("an Int8 tensor is needed"),
        }
    }

    /// Its live rows, to be written one by one.
    pub(super) fn rows_mut(&mut self) -> Vec<RowMut<'_>> {
        let (rows, width) = (self.rows, self.width);
        match &mut self.elements {
            Elements::F32(values) => {
                values.chunks_exact_mut(width).take(rows).map(RowMut::F32).collect()
            }
            Elements::Int8(Int8 { values, scales, sums }) => values
                .chunks_exact_mut(width)
                .zip(scales)
                .zip(sums)
                .take(rows)
                .map(|((values, scale), sum)| RowMut::Int8(values, scale, sum))
                .collect(),
        }
    }
}

impl Footprint for Tensor {
    fn bytes(&self) -> u64 {
        match &self.elements {
            Elements::F32(values) => values.bytes(),
            Elements::Int8(int8) => int8.values.bytes() + 8 * self.capacity as u64,
        }
    }
}
