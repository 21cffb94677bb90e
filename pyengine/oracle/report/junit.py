"""A verdict as JUnit XML."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from ..verdict import DIFFERENT, GUILTY, INHERITED, OK, SUSPECT, Verdict
from .summary import describe, headline, left_out, printable


def as_junit(verdict: Verdict) -> str:
    """One test case per tensor of the reference.

    Tensors that are not in the candidate are marked skipped.  Inherited errors are marked skipped too, so
    that CI counts the guilty.
    """
    inherited_fails = not any(row.status in (GUILTY, SUSPECT, DIFFERENT) for row in verdict.rows)
    suite = ElementTree.Element("testsuite", name="pyengine verify", tests=str(verdict.known))
    failures = skipped = 0
    for row in verdict.rows:
        case = _case(suite, verdict, row.name)
        if row.status == OK:
            continue
        if row.status == INHERITED and not inherited_fails:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message="inherits the error of an earlier tensor")
            continue
        failures += 1
        failure = ElementTree.SubElement(
            case, "failure", type=row.status, message=printable("; ".join(describe(row, verdict)))
        )
        failure.text = printable(row.detail)
    for name in verdict.missing:
        skipped += 1
        ElementTree.SubElement(
            _case(suite, verdict, name), "skipped", message="not compared: the candidate does not have it"
        )
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    suite.set("errors", "0")
    output = ElementTree.SubElement(suite, "system-out")
    output.text = printable("; ".join([headline(verdict), *left_out(verdict)]))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, "unicode") + "\n"


def _case(suite, verdict, name):
    return ElementTree.SubElement(
        suite, "testcase", classname=f"pyengine.{verdict.budget}", name=printable(name), time="0"
    )
