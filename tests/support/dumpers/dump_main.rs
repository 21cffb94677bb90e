//! Writes the trace that test_dumpers.py expects: OUT.
mod pyengine_trace;
use pyengine_trace::{Dtype, Trace};

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).unwrap();
    let mut x = [0.5f32, 1.0, 2.0, 3.0, 4.0, 5.0];
    let mut t = Trace::new();
    t.note("arithmetic", "float32, by hand")?;
    t.ids(&[1, 2, 3])?;
    t.put("model.layers.0", &x, 3, 2)?;
    t.put("lm_head", &x[..2], 1, 2)?;
    let bf16: Vec<u8> = x[..4].iter().flat_map(|v| v.to_le_bytes()[2..4].to_vec()).collect();
    t.put_part("model.layers.1", Dtype::BF16, &bf16, &[0, 2], 2, Some(&[1, 7]))?;
    t.put("model.layers.0.mlp.gate.2", &[3i32, 1, 2, 0, 1, 2], 3, 2)?;
    t.put_bytes("model.layers.2", Dtype::F16, &[0, 0x38, 0, 0x3c, 0, 0x40], 3, 1)?;
    t.put_state("model.layers.0.linear_attn.conv_state", &x)?;
    assert!(t.has("lm_head") && !t.has("model.norm"));
    t.ids(&[4])?;
    t.put("model.layers.0", &x[..2], 1, 2)?;
    t.put("lm_head", &x[..2], 1, 2)?;
    x[0] = 9.0;
    t.put_state("model.layers.0.linear_attn.conv_state", &x)?;
    t.save(&path)?;
    println!("{}", t.put("lm_head", &x[..2], 1, 2).unwrap_err());
    Ok(())
}
