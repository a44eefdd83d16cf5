"""Operations with a plain torch reference each; imports torch alone."""
