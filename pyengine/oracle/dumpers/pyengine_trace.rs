//! pyengine_trace.rs: writes a trace that `pyengine verify` reads.  Needs std alone.
//!
//! Copy this file into your crate (`mod pyengine_trace;`).  Apache-2.0, as the project pyengine.
//!
//! ```ignore
//! let mut trace = Trace::new();
//! trace.note("arithmetic", "float32, candle")?;
//! trace.ids(&[1, 2, 3])?; // the prompt
//! trace.put("model.layers.0", &hidden, 3, 2048)?; // &[f32], row i for token i of the step
//! trace.ids(&[4])?; // a decode step on an id of your choice
//! trace.put("model.layers.0", &hidden, 1, 2048)?;
//! trace.save("mine.safetensors")?;
//! ```
//!
//! Names are Hugging Face's module paths: `pyengine verify --help` and pyengine/oracle/trace.py list them.
//! bfloat16 and float16 go as their bits: `put_bytes(name, Dtype::BF16, &bytes, rows, features)`, little-endian.
//! The file is written by `save`, whole or not at all.
//!
//! `pyengine bisect` runs a program with PYENGINE_IDS (`env_ids`), PYENGINE_TENSORS (`wanted`) and
//! PYENGINE_TRACE (`save_to_env`) in its environment.

use std::io::{Error, ErrorKind, Result, Write};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(dead_code)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    F64,
    I32,
    I64,
    U32,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F64 => "F64",
            Dtype::I32 => "I32",
            Dtype::I64 => "I64",
            Dtype::U32 => "U32",
        }
    }

    fn size(self) -> usize {
        match self {
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F64 | Dtype::I64 => 8,
            _ => 4,
        }
    }
}

/// Values that `put` takes.
pub trait Element: Copy {
    const DTYPE: Dtype;
    fn append(self, bytes: &mut Vec<u8>);
}

macro_rules! element {
    ($($kind:ty => $dtype:ident),*) => {
        $(impl Element for $kind {
            const DTYPE: Dtype = Dtype::$dtype;
            fn append(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
        })*
    };
}
element!(f32 => F32, f64 => F64, i32 => I32, i64 => I64, u32 => U32);

struct Tensor {
    name: String,
    dtype: Dtype,
    features: usize,
    tokens: Vec<i64>,
    columns: Option<Vec<i64>>,
    data: Vec<u8>,
    is_state: bool,
    step: usize,
}

#[derive(Default)]
pub struct Trace {
    ids: Vec<i64>,
    steps: Vec<usize>,
    tensors: Vec<Tensor>,
    notes: Vec<(String, String)>,
}

fn fault<T>(text: String) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidInput, format!("pyengine_trace: {text}")))
}

fn plain(text: &str) -> bool {
    text.bytes().all(|b| (32..127).contains(&b) && b != b'"' && b != b'\\')
}

#[allow(dead_code)]
impl Trace {
    pub fn new() -> Self {
        Self::default()
    }

    /// A note in the metadata: "arithmetic", in your own words; "names", whose names the tensors have.
    pub fn note(&mut self, key: &str, value: &str) -> Result<()> {
        if !plain(key) || !plain(value) {
            return fault(format!("{key}: want plain ASCII without quotes in a note"));
        }
        self.notes.push((key.into(), value.into()));
        Ok(())
    }

    /// Begin a step on these ids: the prompt, a piece of it, or a token that is decoded.
    pub fn ids(&mut self, ids: &[i64]) -> Result<()> {
        if ids.is_empty() {
            return fault("want ids, got none".into());
        }
        self.ids.extend_from_slice(ids);
        self.steps.push(ids.len());
        Ok(())
    }

    /// `data` is [rows, features]; rows: as many as the step has ids, or 1: the last token's.
    pub fn put<E: Element>(&mut self, name: &str, data: &[E], rows: usize, features: usize) -> Result<()> {
        let mut bytes = Vec::with_capacity(data.len() * E::DTYPE.size());
        data.iter().for_each(|x| x.append(&mut bytes));
        self.put_bytes(name, E::DTYPE, &bytes, rows, features)
    }

    /// The same as stored bytes, little-endian: for bfloat16 and float16.
    pub fn put_bytes(&mut self, name: &str, dtype: Dtype, data: &[u8], rows: usize, features: usize) -> Result<()> {
        let step = self.steps.last().copied().unwrap_or(0);
        if rows != step && rows != 1 {
            return fault(format!("{name}: want a row for each of the step's {step} ids, or the last one's, got {rows}"));
        }
        let tokens: Vec<usize> = (step.saturating_sub(rows)..step).collect();
        self.put_part(name, dtype, data, &tokens, features, None)
    }

    /// Part of a tensor: tokens: of each row, in this step, rising; columns: which features, rising.
    pub fn put_part(
        &mut self,
        name: &str,
        dtype: Dtype,
        data: &[u8],
        tokens: &[usize],
        features: usize,
        columns: Option<&[i64]>,
    ) -> Result<()> {
        let step = self.steps.last().copied().unwrap_or(0);
        let start = self.ids.len() - step;
        let number = self.steps.len();
        if step == 0 {
            return fault(format!("{name}: want ids before the tensors"));
        }
        if name.is_empty() || name.contains('@') || !plain(name) {
            return fault(format!("{name}: want a module path"));
        }
        if tokens.is_empty() || features == 0 || data.len() != tokens.len() * features * dtype.size() {
            return fault(format!("{name}: want {} rows of {features} values, got {} bytes", tokens.len(), data.len()));
        }
        if tokens.windows(2).any(|pair| pair[0] >= pair[1]) || tokens[tokens.len() - 1] >= step {
            return fault(format!("{name}: want rising tokens of this step"));
        }
        let place = self.tensors.iter().position(|x| x.name == name).unwrap_or(self.tensors.len());
        if place == self.tensors.len() {
            self.tensors.push(Tensor {
                name: name.into(),
                dtype,
                features,
                tokens: Vec::new(),
                columns: columns.map(<[i64]>::to_vec),
                data: Vec::new(),
                is_state: false,
                step: 0,
            });
        }
        let tensor = &mut self.tensors[place];
        if tensor.step == number {
            return fault(format!("{name}: want a tensor once a step, got it twice"));
        }
        if tensor.dtype != dtype || tensor.features != features {
            return fault(format!("{name}: want the type and the features of the step before"));
        }
        tensor.data.extend_from_slice(data);
        tensor.tokens.extend(tokens.iter().map(|token| (start + token) as i64));
        tensor.step = number;
        Ok(())
    }

    /// A memory of a layer after this step: the one of the last step is kept.
    pub fn put_state<E: Element>(&mut self, name: &str, data: &[E]) -> Result<()> {
        let number = self.steps.len();
        self.tensors.retain(|x| x.name != name || x.step == number);
        self.put(name, data, 1, data.len())?;
        if let Some(tensor) = self.tensors.iter_mut().find(|x| x.name == name) {
            tensor.is_state = true;
        }
        Ok(())
    }

    /// Whether the step has the tensor already.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.iter().any(|x| x.name == name && x.step == self.steps.len())
    }

    fn parts(&self) -> Vec<(String, &'static str, Vec<usize>, Vec<u8>)> {
        let bytes = |values: &[i64]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut parts = vec![("input_ids".to_string(), "I64", vec![self.ids.len()], bytes(&self.ids))];
        for x in &self.tensors {
            parts.push((x.name.clone(), x.dtype.name(), vec![x.tokens.len(), x.features], x.data.clone()));
            if !x.is_state && x.tokens.len() != self.ids.len() {
                parts.push((format!("{}@rows", x.name), "I64", vec![x.tokens.len()], bytes(&x.tokens)));
            }
            if let Some(columns) = &x.columns {
                parts.push((format!("{}@columns", x.name), "I64", vec![columns.len()], bytes(columns)));
            }
        }
        parts
    }

    fn header(&self, parts: &[(String, &'static str, Vec<usize>, Vec<u8>)]) -> String {
        let order: Vec<String> = self.tensors.iter().map(|x| format!("\\\"{}\\\"", x.name)).collect();
        let steps: Vec<String> = self.steps.iter().map(usize::to_string).collect();
        let mut text = format!(
            "{{\"__metadata__\":{{\"format\":\"pyengine-trace-1\",\"order\":\"[{}]\",\"steps\":\"[{}]\"",
            order.join(","),
            steps.join(",")
        );
        for (key, value) in &self.notes {
            text += &format!(",\"{key}\":\"{value}\"");
        }
        text.push('}');
        let mut at = 0;
        for (name, dtype, shape, data) in parts {
            let end = at + data.len();
            text += &format!(",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}");
            at = end;
        }
        text.push('}');
        while text.len() % 8 != 0 {
            text.push(' ');
        }
        text
    }

    /// The file appears when it is complete.
    pub fn save(&self, path: &str) -> Result<()> {
        if self.ids.is_empty() || self.tensors.is_empty() {
            return fault("want ids and tensors, got none".into());
        }
        let parts = self.parts();
        let header = self.header(&parts);
        let partial = format!("{path}.partial");
        let written = (|| {
            let mut file = std::fs::File::create(&partial)?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            for (_, _, _, data) in &parts {
                file.write_all(data)?;
            }
            file.sync_all()?;
            std::fs::rename(&partial, path)
        })();
        if written.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        written
    }

    /// To the file of PYENGINE_TRACE.
    pub fn save_to_env(&self) -> Result<()> {
        match std::env::var("PYENGINE_TRACE") {
            Ok(path) => self.save(&path),
            Err(_) => fault("want PYENGINE_TRACE in the environment".into()),
        }
    }
}

/// Whether PYENGINE_TENSORS asks for a tensor; without the variable every one is wanted.
#[allow(dead_code)]
pub fn wanted(name: &str) -> bool {
    match std::env::var("PYENGINE_TENSORS") {
        Ok(list) => list.split('\n').any(|other| other == name),
        Err(_) => true,
    }
}

/// The ids of PYENGINE_IDS; empty without the variable.
#[allow(dead_code)]
pub fn env_ids() -> Vec<i64> {
    let text = std::env::var("PYENGINE_IDS").unwrap_or_default();
    text.split_whitespace().map_while(|id| id.parse().ok()).collect()
}
