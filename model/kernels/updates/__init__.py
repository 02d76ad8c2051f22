"""The element-wise parts of an optimizer's step."""
