-- finish.lua: ends charges: gives back to windows, and decides about the estimate. Slots are freed before.
--
-- Needs   records.lua, load_period and change (budgets.lua), take_off.lua
-- Gives   finish(op, first, n, mode)

local function finish(op, first, n, mode)
  -- All of a finish but its slots.
  local _, _, time, cost, position = parse('<BBdd', op, 2)
  local record, held, settled, at, periods = mode ~= MONEY_UNTOUCHED and KEYS[first + n + 1], nil, nil, 0, {}
  if record then held, settled, at = get_record(record) end
  if held and settled >= 0 then held = nil end
  for j = 1, n do
    local key, kind, quota, length, granule = KEYS[first + j], parse('<Bddd', op, position)
    if kind == WINDOW and time > 0 then
      take_off(key, quota, length, granule, time, cost)
    elseif kind == BUDGET and held then
      periods[#periods + 1] = load_period(key, granule)
    end
    position = position + LIMIT_SIZE
  end
  if record then call('DEL', record) end
  for _, p in ipairs(periods) do change(p, mode == MONEY_KEEP and held or 0, -held, at) end
end
