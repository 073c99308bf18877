// WGSL allows a division an error of 2.5 ULP and a square root more. One correction step brings
// both to the nearest float on devices that fuse `fma`, and does no harm on those that do not: an
// int8 rounding, a whole step of the quantiser, must not depend on the driver's shortcuts.

fn divide(n: f32, d: f32) -> f32 {
    let q = n / d;
    return fma(fma(-q, d, n), 1.0 / d, q);
}

fn square_root(x: f32) -> f32 {
    let r = sqrt(x);
    return fma(fma(-r, r, x), 0.5 / r, r);
}
