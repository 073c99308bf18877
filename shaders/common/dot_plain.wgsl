// The dot product of two times four packed i8, by shifts and products.
fn dot4(a: u32, b: u32) -> i32 {
    let left = vec4<u32>(24u, 16u, 8u, 0u);
    let x = bitcast<vec4<i32>>(vec4<u32>(a) << left) >> vec4<u32>(24u);
    let y = bitcast<vec4<i32>>(vec4<u32>(b) << left) >> vec4<u32>(24u);
    return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
