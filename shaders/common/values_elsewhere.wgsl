// Values that another kernel quantises and writes.

fn store_value2(at: u32, pair: vec2<f32>) {}
