-- overdue.lua: whether an operation other than a charge comes too late to be done.
--
-- What was given up is sent again, and others may have been done since: a late copy of it would undo them.
--
-- Needs   is_late, kind; op: the operation. A part of whatever does operations
-- Gives   is_overdue

local is_overdue = is_late and (
  kind == DELETE or kind == RENEW
  or kind == SETTLE and byte(op, REPLACE_AT) == 1
  or kind == METER and byte(op, MODE_AT) == UNITS_REPLACE
)
