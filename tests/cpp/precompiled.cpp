// Only for the precompiled headers that all tests share.
