"""Clips with their tasks, prompts and answers, from manifests on disk."""

from mowe.data.manifest import Example, Manifest, read_manifest

__all__ = ["Example", "Manifest", "read_manifest"]
