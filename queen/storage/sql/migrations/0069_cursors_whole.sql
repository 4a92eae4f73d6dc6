-- A cursor is never updated in its page: ready_at, which every step of it changes, is in an index (0 of 46,826 updates were
-- HOT, measured). So the room that was kept for that is not needed: of new pages, a third fewer.
ALTER TABLE queen.cursors SET (fillfactor = 100);
