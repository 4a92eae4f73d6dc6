-- Traces: what consumers record about a message, found again by the message or by a name.
--
-- Lock order: after partitions and cursors, trace_totals by name.

-- data: JSON text of an object, as it came.
CREATE TABLE queen.traces (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    message_offset bigint NOT NULL,
    trace_id uuid NOT NULL,
    transaction_id text NOT NULL,
    event_type text NOT NULL,
    group_name text,
    worker_id text,
    names text[] NOT NULL,
    created_at timestamptz NOT NULL,
    data bytea NOT NULL,
    CONSTRAINT traces_pkey PRIMARY KEY (bucket, partition_id, message_offset, trace_id)
);

-- Serves the removal of old traces.
CREATE INDEX traces_by_age ON queen.traces (bucket, created_at);

-- A trace under one of its names, oldest first.
CREATE TABLE queen.trace_names (
    bucket integer NOT NULL,
    name text NOT NULL,
    created_at timestamptz NOT NULL,
    trace_id uuid NOT NULL,
    partition_id uuid NOT NULL,
    message_offset bigint NOT NULL,
    CONSTRAINT trace_names_pkey PRIMARY KEY (bucket, name, created_at, trace_id)
);

-- Serves the count of messages that a name was recorded for.
CREATE INDEX trace_names_by_message ON queen.trace_names (bucket, name, partition_id, message_offset);

-- How often a name was recorded, and for how many messages, in the partitions of a bucket.
CREATE TABLE queen.trace_totals (
    bucket integer NOT NULL,
    name text NOT NULL,
    traces bigint NOT NULL,
    messages bigint NOT NULL,
    last_seen timestamptz NOT NULL,
    CONSTRAINT trace_totals_pkey PRIMARY KEY (bucket, name)
) WITH (fillfactor = 80);

-- Serves the list of names, the latest first.
CREATE INDEX trace_totals_by_time ON queen.trace_totals (bucket, last_seen);

-- Record traces of one bucket. p_names: the names of all of them, p_name_traces to which (its number, from 1) each belongs.
CREATE OR REPLACE FUNCTION queen.record_traces(
    p_bucket integer, p_now timestamptz, p_trace_ids uuid[], p_partition_ids uuid[], p_offsets bigint[],
    p_transaction_ids text[], p_event_types text[], p_groups text[], p_workers text[], p_data bytea[],
    p_name_traces integer[], p_names text[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    INSERT INTO queen.traces (bucket, partition_id, message_offset, trace_id, transaction_id, event_type, group_name,
        worker_id, names, created_at, data)
    SELECT p_bucket, t.partition_id, t.message_offset, t.trace_id, t.transaction_id, t.event_type, t.group_name,
        t.worker_id,
        ARRAY(SELECT n.name FROM unnest(p_name_traces, p_names) AS n (number, name) WHERE n.number = t.number),
        v_now, t.data
    FROM unnest(p_trace_ids, p_partition_ids, p_offsets, p_transaction_ids, p_event_types, p_groups, p_workers, p_data)
        WITH ORDINALITY
        AS t (trace_id, partition_id, message_offset, transaction_id, event_type, group_name, worker_id, data, number);
    IF cardinality(p_names) = 0 THEN
        RETURN;
    END IF;
    INSERT INTO queen.trace_totals AS t (bucket, name, traces, messages, last_seen)
    SELECT p_bucket, n.name, count(*),
        count(DISTINCT (p_partition_ids[n.number], p_offsets[n.number])) FILTER (WHERE NOT EXISTS (
            SELECT FROM queen.trace_names e WHERE e.bucket = p_bucket AND e.name = n.name
                AND e.partition_id = p_partition_ids[n.number] AND e.message_offset = p_offsets[n.number])),
        v_now
    FROM unnest(p_name_traces, p_names) AS n (number, name)
    GROUP BY n.name
    ORDER BY n.name
    ON CONFLICT ON CONSTRAINT trace_totals_pkey DO UPDATE SET traces = t.traces + excluded.traces,
        messages = t.messages + excluded.messages, last_seen = greatest(t.last_seen, excluded.last_seen);
    INSERT INTO queen.trace_names (bucket, name, created_at, trace_id, partition_id, message_offset)
    SELECT p_bucket, n.name, v_now, p_trace_ids[n.number], p_partition_ids[n.number], p_offsets[n.number]
    FROM unnest(p_name_traces, p_names) AS n (number, name);
END
$$;

-- Remove up to p_limit traces: of partitions, or of one message of one (p_offset), or those older than p_before. Totals go
-- down by what went. Returns how many traces.
CREATE OR REPLACE FUNCTION queen.drop_traces(
    p_bucket integer, p_partition_ids uuid[], p_offset bigint, p_before timestamptz, p_limit integer
) RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_ids uuid[];
    v_partitions uuid[];
    v_offsets bigint[];
    t record;
    v_names text[] := '{}';         -- one for each row of trace_names that went, and 1 where it was the last of its message
    v_last integer[] := '{}';
    v_name text;
BEGIN
    IF p_before IS NULL THEN
        SELECT array_agg(d.trace_id), array_agg(d.partition_id), array_agg(d.message_offset)
        INTO v_ids, v_partitions, v_offsets
        FROM (
            SELECT tr.trace_id, tr.partition_id, tr.message_offset FROM queen.traces tr
            WHERE tr.bucket = p_bucket AND tr.partition_id = ANY (p_partition_ids)
                AND (p_offset IS NULL OR tr.message_offset = p_offset)
            LIMIT p_limit
        ) d;
    ELSE
        SELECT array_agg(d.trace_id), array_agg(d.partition_id), array_agg(d.message_offset)
        INTO v_ids, v_partitions, v_offsets
        FROM (
            SELECT tr.trace_id, tr.partition_id, tr.message_offset FROM queen.traces tr
            WHERE tr.bucket = p_bucket AND tr.created_at < p_before
            ORDER BY tr.created_at LIMIT p_limit
        ) d;
    END IF;
    FOR i IN 1 .. coalesce(cardinality(v_ids), 0) LOOP
        DELETE FROM queen.traces tr WHERE tr.bucket = p_bucket AND tr.partition_id = v_partitions[i]
            AND tr.message_offset = v_offsets[i] AND tr.trace_id = v_ids[i]
        RETURNING tr.created_at, tr.names INTO t;
        CONTINUE WHEN NOT FOUND;    -- another call was faster
        FOREACH v_name IN ARRAY t.names LOOP
            DELETE FROM queen.trace_names n WHERE n.bucket = p_bucket AND n.name = v_name
                AND n.created_at = t.created_at AND n.trace_id = v_ids[i];
            v_names := v_names || v_name;
            v_last := v_last || CASE WHEN EXISTS (
                SELECT FROM queen.trace_names n WHERE n.bucket = p_bucket AND n.name = v_name
                    AND n.partition_id = v_partitions[i] AND n.message_offset = v_offsets[i]) THEN 0 ELSE 1 END;
        END LOOP;
    END LOOP;
    FOR t IN
        SELECT gone.name, count(*) AS traces, sum(gone.last) AS messages
        FROM unnest(v_names, v_last) AS gone (name, last) GROUP BY gone.name ORDER BY gone.name
    LOOP
        UPDATE queen.trace_totals s SET traces = greatest(s.traces - t.traces, 0),
            messages = greatest(s.messages - t.messages, 0)
        WHERE s.bucket = p_bucket AND s.name = t.name;
        DELETE FROM queen.trace_totals s WHERE s.bucket = p_bucket AND s.name = t.name AND s.traces = 0;
    END LOOP;
    RETURN coalesce(cardinality(v_ids), 0);
END
$$;
