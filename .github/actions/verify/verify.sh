#!/usr/bin/env bash
# The step of action.yml.  Its inputs are variables; GitHub's own are GITHUB_OUTPUT, GITHUB_STEP_SUMMARY and
# RUNNER_TEMP.  The exit code is that of `pyengine verify`: 0, 1: not within the budget, 2: unusable input.
set -euo pipefail

environment=$RUNNER_TEMP/pyengine-verify
"$PYTHON" -m venv "$environment"
"$environment/bin/pip" install -q "${PACKAGE:-$ACTION/../../..}"

mkdir -p "$REPORTS"
options=(--html "$REPORTS/verdict.html" --markdown "$REPORTS/verdict.md" --junit "$REPORTS/verdict.xml" --json)
if [[ -n $BUDGET ]]; then options+=(--budget "$BUDGET"); fi
if [[ -n $NAMES ]]; then options+=(--names "$NAMES"); fi

code=0
"$environment/bin/pyengine" verify "$REFERENCE" "$CANDIDATE" "${options[@]}" >"$REPORTS/verdict.json" || code=$?
echo "reports=$REPORTS" >>"$GITHUB_OUTPUT"
if ((code > 1)); then exit "$code"; fi
if ((code)); then echo "ok=false" >>"$GITHUB_OUTPUT"; else echo "ok=true" >>"$GITHUB_OUTPUT"; fi
cat "$REPORTS/verdict.md" | tee -a "$GITHUB_STEP_SUMMARY"
exit "$code"
