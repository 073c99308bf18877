// A matrix unit that multiplies 8 x 8 matrices of f16. Sums are f32.

const SIZE = 8u;
// Sixteen bytes.
const PADDING = 8u;

alias Element = f16;
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
alias Sum = coop_mat8x8<f32, C>;
