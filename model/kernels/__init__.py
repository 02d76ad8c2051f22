"""Operations that have a definition in plain torch and, where it pays, a faster implementation."""
