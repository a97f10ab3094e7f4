-- For wrk: callers in turn, each with an API key of its own; prints what was measured as one line of JSON.
-- Arguments: path, number of callers, the one to begin with.

local head, callers, caller

function init(args)
  head = 'GET ' .. args[1] .. ' HTTP/1.1\r\nHost: bench\r\nX-API-Key: key-'
  callers, caller = tonumber(args[2]), tonumber(args[3])
end

function request()
  caller = (caller + 1) % callers
  return head .. caller .. '\r\n\r\n'
end

function done(summary, latency)
  local e = summary.errors
  print(string.format(
    '{"requests": %d, "seconds": %.6f, "p50": %d, "p99": %d, "failed": %d, "refused": %d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.timeout, e.status))
end
