-- window_start.lua: takes what has left a window off its start, where those are a few entries of its ring.
--
-- Needs   a window as windows.lua has read it. A part of it
-- Gives   `raw`: the window as it is now; nil where there is more to do, as when the end of its life has come to the
--         next multiple of three quarters of a length: then it is audited
-- Cost    one command

-- include window_life
raw = nil
if newest <= now and ring > 0 and ring <= cap and head < cap and is_audited then
  local from = RING + head * ENTRY_SIZE
  local piece = call('GETRANGE', key, from, from + math.min(ring, cap - head, 4) * ENTRY_SIZE - 1)
  for start = 1, #piece - ENTRY_SIZE + 1, ENTRY_SIZE do
    local time, spent = parse(ENTRY, piece, start)
    if time > now - length and spent > 0 then
      if time <= newest and sum >= spent then -- else it is damaged
        local stage = slice(read, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
        raw = pack(WITH_STAGE, sum, time, newest, dies, newest_cost, 0, head, cap, ring, later, stage)
      end
      break
    end
    sum, head, ring = sum - spent, head + 1, ring - 1
  end
end
