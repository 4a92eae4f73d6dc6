-- What servers have done and how they are: written by each worker every few seconds, so that any of them can answer for
-- all. Small tables, in bucket 0. Nothing about messages depends on them.
--
-- Series have three spans, in minutes: 1 is kept for two days, 15 and 360 for longer, so that a page of any window reads
-- at most some 700 rows of each queue or worker.

-- Switches of the whole cluster, kept over restarts. Reference table.
CREATE TABLE queen.switches (
    name text NOT NULL,
    enabled boolean NOT NULL,
    changed_at timestamptz NOT NULL,
    CONSTRAINT switches_pkey PRIMARY KEY (name)
);

-- A worker process that runs, or ran until seen_at. state: its gauges and who waits on it, as JSON.
CREATE TABLE queen.processes (
    bucket integer NOT NULL,
    process_id uuid NOT NULL,
    hostname text NOT NULL,
    worker_id text NOT NULL,
    pid integer NOT NULL,
    started_at timestamptz NOT NULL,
    seen_at timestamptz NOT NULL,
    state text NOT NULL,
    CONSTRAINT processes_pkey PRIMARY KEY (bucket, process_id)
) WITH (fillfactor = 50);

-- What all workers together have done since the database was made: only grows, whoever restarts.
CREATE TABLE queen.cluster_counters (
    bucket integer NOT NULL,
    name text NOT NULL,
    value bigint NOT NULL,
    CONSTRAINT cluster_counters_pkey PRIMARY KEY (bucket, name)
) WITH (fillfactor = 50);

-- What was done on a queue in the span of minutes that begins at `at`; the zero id: on all queues.
CREATE TABLE queen.queue_series (
    bucket integer NOT NULL,
    span smallint NOT NULL,
    at timestamptz NOT NULL,
    queue_id uuid NOT NULL,
    push_requests bigint NOT NULL,
    push_messages bigint NOT NULL,
    pop_requests bigint NOT NULL,
    pop_messages bigint NOT NULL,
    pop_empty bigint NOT NULL,
    ack_requests bigint NOT NULL,
    ack_success bigint NOT NULL,
    ack_failed bigint NOT NULL,
    transactions bigint NOT NULL,
    dead_letters bigint NOT NULL,
    lag_ms bigint NOT NULL,         -- sum over lag_count delivered messages: from their push to their delivery
    lag_count bigint NOT NULL,
    retention_messages bigint NOT NULL,
    completed_messages bigint NOT NULL,
    eviction_messages bigint NOT NULL,
    expiries bigint NOT NULL,       -- sweeps that removed something
    partitions_created bigint NOT NULL,
    partitions_deleted bigint NOT NULL,
    lag_max_ms bigint NOT NULL,
    CONSTRAINT queue_series_pkey PRIMARY KEY (bucket, span, at, queue_id)
) WITH (fillfactor = 70);

-- Serves the series of one queue.
CREATE INDEX queue_series_by_queue ON queen.queue_series (bucket, span, queue_id, at);

-- What a worker has done, and its gauges: `samples` of them, with sum, least, greatest and last of each
-- (queen.model.metrics.GAUGES gives their order).
CREATE TABLE queen.worker_series (
    bucket integer NOT NULL,
    span smallint NOT NULL,
    at timestamptz NOT NULL,
    hostname text NOT NULL,
    worker_id text NOT NULL,
    pid integer NOT NULL,
    samples bigint NOT NULL,
    counters bigint[] NOT NULL,
    lag_max_ms bigint NOT NULL,
    sums double precision[] NOT NULL,
    leasts double precision[] NOT NULL,
    greatests double precision[] NOT NULL,
    lasts double precision[] NOT NULL,
    CONSTRAINT worker_series_pkey PRIMARY KEY (bucket, span, at, hostname, worker_id)
) WITH (fillfactor = 70);

-- How many pops waited on a queue at a worker, at most, in the span.
CREATE TABLE queen.parked_series (
    bucket integer NOT NULL,
    span smallint NOT NULL,
    at timestamptz NOT NULL,
    queue_id uuid NOT NULL,
    hostname text NOT NULL,
    worker_id text NOT NULL,
    parked integer NOT NULL,
    CONSTRAINT parked_series_pkey PRIMARY KEY (bucket, span, at, queue_id, hostname, worker_id)
);

-- Elementwise: what the vectors of two rows are together. A vector of another length is of another version: the new one
-- counts.
CREATE OR REPLACE FUNCTION queen.add_vectors(a bigint[], b bigint[]) RETURNS bigint[] LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN cardinality(a) <> cardinality(b) THEN b ELSE ARRAY(SELECT x + y FROM unnest(a, b) AS v (x, y)) END
$$;

-- a is of a row with a_samples measurements, b of one with b_samples.
CREATE OR REPLACE FUNCTION queen.merge_vectors(
    a double precision[], a_samples bigint, b double precision[], b_samples bigint, p_how text
) RETURNS double precision[] LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN b_samples = 0 THEN a WHEN a_samples = 0 OR cardinality(a) <> cardinality(b) THEN b ELSE ARRAY(
        SELECT CASE p_how WHEN 'sum' THEN x + y WHEN 'least' THEN least(x, y) ELSE greatest(x, y) END
        FROM unnest(a, b) AS v (x, y)) END
$$;

-- Add what a worker did on queues since it last said so. p_values: 19 numbers a queue, in the order of the columns of
-- queue_series; a queue that is gone is left out. NULL in p_names stands for all queues.
CREATE OR REPLACE FUNCTION queen.record_queues(p_now timestamptz, p_names text[], p_values bigint[])
RETURNS void LANGUAGE plpgsql SET jit = off AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    INSERT INTO queen.queue_series AS t
    SELECT 0, s.span, date_bin(make_interval(mins => s.span), v_now, '2000-01-01T00:00:00Z'),
        coalesce(q.queue_id, '00000000-0000-0000-0000-000000000000'),
        v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17],
        v[18], v[19]
    FROM unnest(p_names) WITH ORDINALITY AS n (name, number)
    CROSS JOIN LATERAL (SELECT p_values[(n.number - 1) * 19 + 1 : n.number * 19] AS v) given
    LEFT JOIN queen.queues q ON q.name = n.name
    CROSS JOIN (VALUES (1), (15), (360)) AS s (span)
    WHERE q.queue_id IS NOT NULL OR n.name IS NULL
    ORDER BY s.span, q.queue_id
    ON CONFLICT ON CONSTRAINT queue_series_pkey DO UPDATE SET
        push_requests = t.push_requests + excluded.push_requests,
        push_messages = t.push_messages + excluded.push_messages,
        pop_requests = t.pop_requests + excluded.pop_requests, pop_messages = t.pop_messages + excluded.pop_messages,
        pop_empty = t.pop_empty + excluded.pop_empty, ack_requests = t.ack_requests + excluded.ack_requests,
        ack_success = t.ack_success + excluded.ack_success, ack_failed = t.ack_failed + excluded.ack_failed,
        transactions = t.transactions + excluded.transactions, dead_letters = t.dead_letters + excluded.dead_letters,
        lag_ms = t.lag_ms + excluded.lag_ms, lag_count = t.lag_count + excluded.lag_count,
        retention_messages = t.retention_messages + excluded.retention_messages,
        completed_messages = t.completed_messages + excluded.completed_messages,
        eviction_messages = t.eviction_messages + excluded.eviction_messages,
        expiries = t.expiries + excluded.expiries,
        partitions_created = t.partitions_created + excluded.partitions_created,
        partitions_deleted = t.partitions_deleted + excluded.partitions_deleted,
        lag_max_ms = greatest(t.lag_max_ms, excluded.lag_max_ms);
END
$$;

-- A worker says that it lives, how it is, and what it did since it last said so. p_counters have the names of p_names.
CREATE OR REPLACE FUNCTION queen.record_worker(
    p_now timestamptz, p_process_id uuid, p_hostname text, p_worker_id text, p_pid integer, p_started_at timestamptz,
    p_state text, p_samples bigint, p_names text[], p_counters bigint[], p_lag_max_ms bigint,
    p_sums double precision[], p_leasts double precision[], p_greatests double precision[], p_lasts double precision[],
    p_parked_queues text[], p_parked integer[]
) RETURNS void LANGUAGE plpgsql SET jit = off AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    INSERT INTO queen.processes AS t (bucket, process_id, hostname, worker_id, pid, started_at, seen_at, state)
    VALUES (0, p_process_id, p_hostname, p_worker_id, p_pid, p_started_at, v_now, p_state)
    ON CONFLICT ON CONSTRAINT processes_pkey DO UPDATE SET seen_at = excluded.seen_at, state = excluded.state;
    INSERT INTO queen.worker_series AS t
    SELECT 0, s.span, date_bin(make_interval(mins => s.span), v_now, '2000-01-01T00:00:00Z'), p_hostname, p_worker_id,
        p_pid, p_samples, p_counters, p_lag_max_ms, p_sums, p_leasts, p_greatests, p_lasts
    FROM (VALUES (1), (15), (360)) AS s (span)
    ON CONFLICT ON CONSTRAINT worker_series_pkey DO UPDATE SET pid = excluded.pid,
        samples = t.samples + excluded.samples, counters = queen.add_vectors(t.counters, excluded.counters),
        lag_max_ms = greatest(t.lag_max_ms, excluded.lag_max_ms),
        sums = queen.merge_vectors(t.sums, t.samples, excluded.sums, excluded.samples, 'sum'),
        leasts = queen.merge_vectors(t.leasts, t.samples, excluded.leasts, excluded.samples, 'least'),
        greatests = queen.merge_vectors(t.greatests, t.samples, excluded.greatests, excluded.samples, 'greatest'),
        lasts = CASE WHEN excluded.samples = 0 THEN t.lasts ELSE excluded.lasts END;
    INSERT INTO queen.cluster_counters AS t (bucket, name, value)
    SELECT 0, c.name, c.value FROM unnest(p_names, p_counters) AS c (name, value) WHERE c.value > 0
    ORDER BY c.name
    ON CONFLICT ON CONSTRAINT cluster_counters_pkey DO UPDATE SET value = t.value + excluded.value;
    INSERT INTO queen.parked_series AS t
    SELECT 0, s.span, date_bin(make_interval(mins => s.span), v_now, '2000-01-01T00:00:00Z'), q.queue_id, p_hostname,
        p_worker_id, p.parked
    FROM unnest(p_parked_queues, p_parked) AS p (name, parked)
    JOIN queen.queues q ON q.name = p.name
    CROSS JOIN (VALUES (1), (15), (360)) AS s (span)
    ORDER BY s.span, q.queue_id
    ON CONFLICT ON CONSTRAINT parked_series_pkey DO UPDATE SET parked = greatest(t.parked, excluded.parked);
END
$$;

-- One bounded step of forgetting: of one span, the oldest hour (of spans of a minute) or day that is before p_before.
-- True when there may be more.
CREATE OR REPLACE FUNCTION queen.forget_series(p_span smallint, p_before timestamptz) RETURNS boolean LANGUAGE plpgsql
SET jit = off AS $$
DECLARE
    v_step interval := CASE WHEN p_span = 1 THEN interval '1 hour' ELSE interval '1 day' END;
    v_until timestamptz;
BEGIN
    SELECT least(min(first.at) + v_step, p_before) INTO v_until FROM (
        (SELECT at FROM queen.queue_series WHERE bucket = 0 AND span = p_span ORDER BY at LIMIT 1)
        UNION ALL (SELECT at FROM queen.worker_series WHERE bucket = 0 AND span = p_span ORDER BY at LIMIT 1)
        UNION ALL (SELECT at FROM queen.parked_series WHERE bucket = 0 AND span = p_span ORDER BY at LIMIT 1)
    ) first WHERE first.at < p_before;
    IF v_until IS NULL THEN
        RETURN false;
    END IF;
    DELETE FROM queen.queue_series WHERE bucket = 0 AND span = p_span AND at < v_until;
    DELETE FROM queen.worker_series WHERE bucket = 0 AND span = p_span AND at < v_until;
    DELETE FROM queen.parked_series WHERE bucket = 0 AND span = p_span AND at < v_until;
    RETURN v_until < p_before;
END
$$;
