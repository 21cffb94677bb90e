"""The columns of a data set of soft labels, in memory and in Parquet.

One row is one document, or one piece of a document that was split.  T is the number of its tokens.

    Row j of every label column is about token j + 1: it is the teacher's distribution after tokens
    0 to j.  It has the place of the student's logits at position j.

Columns of every layout
    document         string: the document's name
    start            int32: the place of the row's first token in the document; 0 unless it was split
    input_ids        list<int32> [T]
    assistant_masks  list<int8> [T]: 1 for a token to learn (of a conversation, what the assistant wrote; of a
                     text, every token).  assistant_masks[j] is about token j itself, not about row j
    true_logprob     list<float> [T]: the log-probability of token j + 1; NaN where the document ends
    logsumexp        list<float> [T]: ln(sum(exp(logits / temperature))), so that a logit divided by the
                     temperature is a log-probability plus logsumexp
    outside          list<float> [T]: the probability of all ids that have no label in row j

Log-probabilities are natural logarithms of softmax(logits / temperature) over the whole vocabulary: they are
not normalised over the labels.

Labels, in memory (`labels.Labels`, NumPy): L labels a row
    ids       int32 [T, L]: by falling log-probability, the lower id first among equals; -1 where a row has
              fewer than L labels (sampled labels only; such places are at the end)
    logprobs  float32 [T, L]; -inf where ids is -1
    weights   float32 [T, L], of sampled labels only; 0 where ids is -1.  The weights are an unbiased estimate
              of the probabilities of all ids: the mean over all draws of the weight of an id, 0 where it was
              not drawn, is its probability.  For top-k labels weights is None: they are exp(logprobs)

Labels, layout "lists"
    label_ids        list<list<int32>> [T][L], without the places that are -1
    label_logprobs   list<list<float>> [T][L]
    label_weights    list<list<float>> [T][L], of sampled labels only

Labels, layout "packed" (the default): binary columns of bytes.  NAME_0, NAME_1, ... have the bytes of one
array of unsigned integers, the lowest byte of every element in NAME_0, the next in NAME_1; elements row by
row, without the places that are -1.  Bytes of one weight lie together, which is what zstd makes small.
    ids_0 ..         the ids: as many columns as vocab_size - 1 has bytes
    gaps_0, gaps_1   the log-probabilities: -logprob is rounded to float16 with `fraction_bits` (F) bits of
                     fraction, nearest, ties to even; its bits as an integer, divided by 2^(10 - F), ascend
                     along a row; gaps are the first of a row and then the differences from one to the next
    weights_0 .. 3   the bits of the weights as float32, of sampled labels only
    sizes_0, sizes_1 the number of labels of each row, of sampled labels only
A log-probability x comes back within 2^-(F + 1) * |x| + 2^-22, F from 7 to 10.

Labels, layout "distillkit": the columns of arcee-ai/DistillKit, for its own reader (distillkit.py);
`input_ids` is list<uint64>.
    compressed_logprobs, bytepacked_indices   list<list<uint8>> [T][bytes]

The metadata of every schema has one key, `pyengine.labels`, with JSON; `labels.json` beside the Parquet files
has the same and, when everything is there, "complete": true.
    format          "pyengine-labels-1"
    row             the sentence about row j above
    engine          {name, version}
    model           {name, digest: sha256, architecture, vocab_size}
    tokenizer       {digest: sha256} of the bytes of every id; null for ids without a tokenizer
    chat_template   {digest: sha256}; null without conversations
    arithmetic      "locked", "locked-kv16" or "float64"
    temperature     of the teacher's softmax
    labels          {kind: "top-k", k} or {kind: "sample", draws, proposal_temperature, seed}
    layout          {name: "packed", sampled, k, fraction_bits, id_bytes}, {name: "lists", sampled} or
                    {name: "distillkit", config}
    input           {digest: sha256 of names, ids and masks, documents, rows, tokens, longest, context,
                    too_long}
    part_tokens     the least number of tokens of a Parquet file, but the last; parts: the number of files
"""

from __future__ import annotations

FORMAT = "pyengine-labels-1"
METADATA_KEY = "pyengine.labels"
DESCRIPTION = "labels.json"
ROW = "row j of every label column is about token j + 1: the teacher's distribution after tokens 0 to j"

COMMON = ("document", "start", "input_ids", "assistant_masks", "true_logprob", "logsumexp", "outside")
LAYOUTS = ("packed", "lists", "distillkit")
FRACTION_BITS = (7, 8, 9, 10)
DEFAULT_FRACTION_BITS = 8
