"""Published weights in and out: one config mapping and one name table a family, one guarded reader for all."""
