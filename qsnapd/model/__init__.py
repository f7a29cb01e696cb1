"""The words of qsnapd as types: frozen, validated, without any I/O."""
