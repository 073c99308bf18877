// A matrix unit that multiplies 16 x 16 matrices of f16. Sums are f32.

const SIZE = 16u;
// Sixteen bytes.
const PADDING = 8u;

alias Element = f16;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;
