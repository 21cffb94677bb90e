"""Examples at the end of each command's --help; a test parses each of them."""

EXAMPLES = {
    "info": """
        pyengine info model.gguf
        pyengine info model.gguf --memory -c 32768 --json
        pyengine info int8-directory --provenance
    """,
    "quantize": """
        pyengine quantize model.gguf --int8 model-int8 --int4 model-int4
        pyengine quantize model.gguf --int4 model-int4 --scale mse
        pyengine quantize model.gguf --mixed model-mixed
        pyengine quantize model.gguf --mixed model-mixed --mix "*.layers.[0-3].*=int8" --dry-run
        pyengine quantize model.gguf --int8 model-int8 --int4 model-int4 --card -f text.txt
        pyengine quantize model.gguf --int4 model-int4 --card card.html --license apache-2.0
        pyengine quantize model-int4 --export compressed-tensors --int4 model-int4-ct
    """,
    "verify-files": """
        pyengine verify-files model-int8
        pyengine verify-files model-int8 --twin model-int4 --source model.gguf
    """,
    "merge": """
        pyengine merge merge.yaml merged
        pyengine merge merge.yaml --int8 merged-int8 --int4 merged-int4 --scale mse -s 7
    """,
    "quality": """
        pyengine quality model.gguf --int4 --scale mse
        pyengine quality model-int8 model-int4 --source model.gguf --plot quality.svg
        pyengine quality model-int8 model-int4 --source model.gguf -f text.txt -f code.txt
        pyengine quality model-mixed --source model.gguf -f text.txt --by-layer --card model-mixed/README.md
    """,
    "tokenize": """
        pyengine tokenize -m model.gguf -p "In the beginning"
        pyengine tokenize -m model.gguf -f - --count < book.txt
        pyengine tokenize -m model.gguf --decode "[1191, 258, 1795]"
    """,
    "labels": """
        pyengine labels -m teacher.gguf -f texts -o labels --too-long split
        pyengine labels -m teacher.gguf -f talks.jsonl -o labels --top-k 20 --layout lists
        pyengine labels -m teacher.gguf -f texts -o labels --sample 12
        pyengine labels -m teacher.gguf -f ids.parquet --ids -o s3://bucket/labels --ray auto --workers 8
    """,
    "vocabulary": """
        pyengine vocabulary model.gguf qwen.tiktoken
        pyengine vocabulary model.gguf student/tokenizer.json -f text.txt --probabilities
    """,
    "relabel": """
        pyengine relabel labels -m model.gguf --student student/tokenizer.json -o labels-student
        pyengine relabel labels -m model.gguf --student student --pair "<|im_end|>=</s>" -o labels-student
    """,
    "generate": """
        pyengine generate -m model.gguf -p "In the beginning" -n 100
        pyengine generate -m model.gguf -f prompt.txt --temp 0.7 --top-p 0.9 -s -1
        pyengine generate -m model.gguf -p - --json < prompt.txt
        pyengine generate -m model.gguf --ids "1 2 3" -n -1
    """,
    "chat": """
        pyengine chat -m model.gguf
        pyengine chat -m model.gguf -sys "Answer in one sentence." --reasoning off
        pyengine chat -m model.gguf --drop-oldest --temp 0.7 -s -1
        printf 'Why is the sky blue?\\n' | pyengine chat -m model.gguf
    """,
    "serve": """
        pyengine serve -m model.gguf
        pyengine serve -m model.gguf --host 0.0.0.0 --port 8000 -a my-model -c 8192
    """,
    "logits": """
        pyengine logits -m model.gguf -p "In the beginning" -o logits.npy
        pyengine logits -m model.gguf --ids-file ids.txt --arithmetic float64 -o logits.npy
    """,
    "trace": """
        pyengine trace -m model.gguf -f prompt.txt -o trace.safetensors
        pyengine trace -m model.gguf --ids-file ids.npy --arithmetic float64 -o trace.safetensors
        pyengine trace -m model.gguf -p "In the beginning" --eval-callback log.txt -o trace.safetensors
    """,
    "dumper": """
        pyengine dumper c -o pyengine_trace.h
        pyengine dumper torch
    """,
    "verify": """
        pyengine verify model.gguf mine.safetensors --budget bfloat16
        pyengine verify reference.safetensors mine.safetensors --json
        pyengine verify model.gguf mine.safetensors --names vllm --budget bfloat16 --html verdict.html
    """,
    "bisect": """
        pyengine bisect -m model.gguf --ids "1 2 3" -- ./my_engine --model model.gguf
        pyengine bisect -m model.gguf -f prompt.txt --budget bfloat16 --html verdict.html -- python run.py
    """,
    "reference": """
        pyengine reference model.gguf --ids-file ids.txt --budget bfloat16 -o reference.safetensors
        pyengine reference model.gguf -f prompt.txt --rows 64 --features 2048 -o reference.safetensors
    """,
    "lm-eval": """
        pyengine lm-eval -m model.gguf --tasks gpqa_diamond_zeroshot --apply-chat-template
        pyengine lm-eval -m model-int4 --tasks verses --include-path my-tasks --limit 100 --json
        """,
    "perplexity": """
        pyengine perplexity -m model.gguf -f wiki.test.raw
        pyengine perplexity -m model.gguf -f wiki.test.raw --kl-divergence-base base.kld
        pyengine perplexity -m model-int4 --kl-divergence --kl-divergence-base base.kld
    """,
    "calibrate": """
        pyengine calibrate -m model.gguf -f text.txt -o stats.gguf
        pyengine calibrate -m model.gguf -f prose.txt -f code.txt --all-experts -o stats.gguf
        """,
    "census": """
        pyengine census -m model.gguf -f text.txt
        pyengine census -m mother -f prose.txt -f code.txt --json
        pyengine census -m father --other mother -f text.txt --plot census.svg
        pyengine census -m model.gguf -f text.txt --layer 3
    """,
    "probe": """
        pyengine probe -m father -m mother -f probes.txt
        pyengine probe -m father -m mother -f probes.jsonl --modules --plot probe.svg
    """,
    "bench": """
        pyengine bench -m model.gguf
        pyengine bench -m model.gguf -p 512,1024 -n 64 -t 1,2 -o jsonl
        pyengine bench -m model.gguf -p 0 -n 32 -d 0,4096
    """,
    "demo": """
        pyengine demo
    """,
}
