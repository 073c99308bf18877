// A matrix unit that multiplies 8 x 8 matrices of f32. Sums are f32.

const SIZE = 8u;
// Sixteen bytes.
const PADDING = 4u;

alias Element = f32;
alias Left = coop_mat8x8<f32, A>;
alias Right = coop_mat8x8<f32, B>;
alias Sum = coop_mat8x8<f32, C>;
