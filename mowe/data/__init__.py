"""Clips with their tasks, prompts and answers, from manifests on disk."""

from mowe.data.manifest import Example, Manifest, check_prompt, read_manifest

__all__ = ["Example", "Manifest", "check_prompt", "read_manifest"]
