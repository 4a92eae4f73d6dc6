-- Streams: queries whose operators run in the client. Kept here: which queries there are, what they remember for each
-- source partition, and the cycle that commits state, sink messages and the position of the source as one step.
--
-- Lock order: stream_partitions, then as everywhere partitions by id, then cursors by (id, group).

-- Reference table. A query is known by its name; it keeps its id when its operators change.
CREATE TABLE queen.stream_queries (
    query_id uuid NOT NULL,
    name text NOT NULL,
    source_queue text NOT NULL,
    sink_queue text,
    config_hash text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    CONSTRAINT stream_queries_pkey PRIMARY KEY (query_id),
    CONSTRAINT stream_queries_name_unique UNIQUE (name)
);

-- A source partition that a query has had a cycle on, in the bucket of that partition. The lock of its row makes the
-- cycles on it one after the other.
-- last_digest: of the request that was applied last, where a repeat of it can be told from a new one; last_answer: what
-- its sink messages became (storage/streams.py).
CREATE TABLE queen.stream_partitions (
    bucket integer NOT NULL,
    query_id uuid NOT NULL,
    partition_id uuid NOT NULL,
    last_digest bytea,
    last_answer bytea,
    CONSTRAINT stream_partitions_pkey PRIMARY KEY (bucket, query_id, partition_id)
) WITH (fillfactor = 60);

-- Serves the removal of a partition: which queries remember something of it.
CREATE INDEX stream_partitions_by_partition ON queen.stream_partitions (bucket, partition_id);

-- What a query remembers of a source partition. key: UTF-8, in the order of its bytes. value: JSON text as it came, in
-- the form, codec and key of a segment body. window_end: its member windowEnd where that is a number.
CREATE TABLE queen.stream_state (
    bucket integer NOT NULL,
    query_id uuid NOT NULL,
    partition_id uuid NOT NULL,
    key bytea NOT NULL,
    window_end double precision,
    codec smallint NOT NULL,
    key_id text,
    value bytea NOT NULL,
    updated_at timestamptz NOT NULL,
    CONSTRAINT stream_state_pkey PRIMARY KEY (bucket, query_id, partition_id, key),
    CONSTRAINT stream_state_codec_known CHECK (codec IN (0, 1))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

-- Serves the idle flush: the windows of a partition that are over.
CREATE INDEX stream_state_ripe ON queen.stream_state (bucket, query_id, partition_id, window_end)
    WHERE window_end IS NOT NULL;

-- Register a query, or find it again. `outcome`: fresh, same, reset (its state is then wiped bucket by bucket with
-- queen.wipe_stream, in the same transaction), or mismatch (nothing changed).
CREATE OR REPLACE FUNCTION queen.register_stream(
    p_now timestamptz, p_query_id uuid, p_name text, p_source_queue text, p_sink_queue text, p_config_hash text,
    p_reset boolean
) RETURNS TABLE (query_id uuid, outcome text) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_query record;
BEGIN
    INSERT INTO queen.stream_queries (query_id, name, source_queue, sink_queue, config_hash, created_at, updated_at)
    VALUES (p_query_id, p_name, p_source_queue, p_sink_queue, p_config_hash, v_now, v_now)
    ON CONFLICT ON CONSTRAINT stream_queries_name_unique DO NOTHING;
    IF FOUND THEN
        query_id := p_query_id; outcome := 'fresh';
        RETURN NEXT;
        RETURN;
    END IF;
    SELECT q.query_id, q.config_hash INTO v_query FROM queen.stream_queries q WHERE q.name = p_name FOR UPDATE;
    query_id := v_query.query_id;
    outcome := CASE WHEN v_query.config_hash = p_config_hash THEN 'same' WHEN p_reset THEN 'reset' ELSE 'mismatch' END;
    IF outcome <> 'mismatch' THEN
        UPDATE queen.stream_queries q SET source_queue = p_source_queue, sink_queue = p_sink_queue,
            config_hash = p_config_hash, updated_at = v_now
        WHERE q.query_id = v_query.query_id;
    END IF;
    RETURN NEXT;
END
$$;

-- Forget all that a query remembers in one bucket. Waits for the cycles that are under way.
CREATE OR REPLACE FUNCTION queen.wipe_stream(p_bucket integer, p_query_id uuid) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
BEGIN
    PERFORM FROM queen.stream_partitions s WHERE s.bucket = p_bucket AND s.query_id = p_query_id
    ORDER BY s.partition_id FOR UPDATE;
    DELETE FROM queen.stream_partitions s WHERE s.bucket = p_bucket AND s.query_id = p_query_id;
    DELETE FROM queen.stream_state s WHERE s.bucket = p_bucket AND s.query_id = p_query_id;
END
$$;

-- Forget what queries remember of partitions that are being removed.
CREATE OR REPLACE FUNCTION queen.forget_stream_partitions(p_bucket integer, p_partition_ids uuid[]) RETURNS void
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
BEGIN
    WITH gone AS (
        DELETE FROM queen.stream_partitions s WHERE s.bucket = p_bucket AND s.partition_id = ANY (p_partition_ids)
        RETURNING s.query_id, s.partition_id
    )
    DELETE FROM queen.stream_state s USING gone
    WHERE s.bucket = p_bucket AND s.query_id = gone.query_id AND s.partition_id = gone.partition_id;
END
$$;

-- Begin a cycle: wait for the turn on (query, partition), and say which queue the partition is of (NULL: of none that
-- exists) and what the last cycle left. No row: there is no such query.
CREATE OR REPLACE FUNCTION queen.begin_cycle(p_bucket integer, p_query_id uuid, p_partition_id uuid)
RETURNS TABLE (queue_name text, encrypted boolean, last_digest bytea, last_answer bytea) LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM queen.stream_queries q WHERE q.query_id = p_query_id;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    LOOP
        SELECT s.last_digest, s.last_answer INTO last_digest, last_answer FROM queen.stream_partitions s
        WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
        FOR NO KEY UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO queen.stream_partitions (bucket, query_id, partition_id)
        VALUES (p_bucket, p_query_id, p_partition_id)
        ON CONFLICT ON CONSTRAINT stream_partitions_pkey DO NOTHING;
    END LOOP;
    SELECT q.name, q.encryption_enabled INTO queue_name, encrypted
    FROM queen.partitions p JOIN queen.queues q ON q.queue_id = p.queue_id
    WHERE p.bucket = p_bucket AND p.partition_id = p_partition_id;
    RETURN NEXT;
END
$$;

-- Put and remove state. The caller holds the turn; a key comes once.
CREATE OR REPLACE FUNCTION queen.change_stream_state(
    p_bucket integer, p_now timestamptz, p_query_id uuid, p_partition_id uuid,
    p_keys bytea[], p_window_ends double precision[], p_codecs smallint[], p_key_ids text[], p_values bytea[],
    p_deleted bytea[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    INSERT INTO queen.stream_state (bucket, query_id, partition_id, key, window_end, codec, key_id, value, updated_at)
    SELECT p_bucket, p_query_id, p_partition_id, given.key, given.window_end, given.codec, given.key_id, given.value, v_now
    FROM unnest(p_keys, p_window_ends, p_codecs, p_key_ids, p_values)
        AS given (key, window_end, codec, key_id, value)
    ON CONFLICT ON CONSTRAINT stream_state_pkey DO UPDATE SET window_end = excluded.window_end,
        codec = excluded.codec, key_id = excluded.key_id, value = excluded.value, updated_at = excluded.updated_at;
    DELETE FROM queen.stream_state s
    WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
        AND s.key = ANY (p_deleted);
END
$$;

-- The acknowledgement of a cycle: p_offset is the last message of the processed prefix. With p_release the lease ends
-- whatever is left of its batch; without, it stays as it is, and the rest is delivered again when it has expired.
-- `lost`: p_lease_id (NULL: no check) is not the live lease, and nothing changed. `held`: there was a lease to end.
-- `moved`: by how many messages the cursor moved.
CREATE OR REPLACE FUNCTION queen.ack_cycle(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_partition_id uuid, p_group text, p_lease_id uuid,
    p_offset bigint, p_release boolean
) RETURNS TABLE (lost boolean, held boolean, moved bigint) LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    c record;
    v_live boolean;
    v_committed bigint;
BEGIN
    LOOP
        SELECT cu.* INTO c FROM queen.cursors cu
        WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_id AND cu.group_name = p_group
        FOR NO KEY UPDATE;
        EXIT WHEN FOUND;
        -- an ack without a pop before: the group's cursor in this partition begins here
        INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed, ready_at)
        SELECT p_bucket, p.partition_id, p_group, p.queue_id, 0, v_now
        FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = p_partition_id
        ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING;
        IF NOT FOUND AND NOT EXISTS (
            SELECT FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = p_partition_id
        ) THEN
            lost := true; held := false; moved := 0;  -- removed since its message was found
            RETURN NEXT;
            RETURN;
        END IF;
    END LOOP;
    v_live := c.lease_id IS NOT NULL AND c.lease_expires_at > v_now AND c.lease_epoch = p_epoch;
    lost := p_lease_id IS NOT NULL AND NOT (v_live AND c.lease_id = p_lease_id);
    held := false; moved := 0;
    IF lost THEN
        RETURN NEXT;
        RETURN;
    END IF;
    v_committed := greatest(c.committed, p_offset + 1);
    moved := v_committed - c.committed;
    held := c.lease_id IS NOT NULL AND p_release;
    IF p_release THEN
        UPDATE queen.cursors cu SET committed = v_committed, ready_at = v_now, retry_count = 0, attempt = 0,
            lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL,
            acked = NULL, skips = queen.skips_from(c.skips, v_committed),
            completed_lease_id = coalesce(c.lease_id, c.completed_lease_id), consumed_at = v_now
        WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_id AND cu.group_name = p_group;
    ELSE
        UPDATE queen.cursors cu SET committed = v_committed,
            attempt = CASE WHEN moved > 0 THEN 0 ELSE c.attempt END,
            acked = CASE WHEN v_live AND v_committed > c.lease_first
                THEN coalesce(c.acked, '{}'::int8multirange)
                    + int8multirange(int8range(c.lease_first, least(v_committed, c.lease_end)))
                ELSE c.acked END,
            skips = queen.skips_from(c.skips, v_committed), consumed_at = v_now
        WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_id AND cu.group_name = p_group;
    END IF;
    IF moved > 0 THEN
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        VALUES (p_bucket, 5, c.queue_id, moved, p_group);
    END IF;
    RETURN NEXT;
END
$$;

-- Read state, ordered by key. Filters are joined by AND; those that are NULL do not count. p_from <= key < p_to.
CREATE OR REPLACE FUNCTION queen.read_stream_state(
    p_bucket integer, p_query_id uuid, p_partition_id uuid, p_keys bytea[], p_from bytea, p_to bytea,
    p_ripe_until double precision
) RETURNS TABLE (key bytea, codec smallint, key_id text, value bytea, updated_at timestamptz) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF p_keys IS NOT NULL THEN
        RETURN QUERY SELECT s.key, s.codec, s.key_id, s.value, s.updated_at FROM queen.stream_state s
            WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
                AND s.key = ANY (p_keys) AND s.key >= p_from AND s.key < p_to
                AND (p_ripe_until IS NULL OR s.window_end <= p_ripe_until)
            ORDER BY s.key;
    ELSIF p_ripe_until IS NOT NULL THEN
        -- first by the end of the window: of many that are open, few are over
        RETURN QUERY WITH ripe AS MATERIALIZED (
                SELECT * FROM queen.stream_state s
                WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
                    AND s.window_end <= p_ripe_until
            )
            SELECT r.key, r.codec, r.key_id, r.value, r.updated_at FROM ripe r
            WHERE r.key >= p_from AND r.key < p_to
            ORDER BY r.key;
    ELSE
        RETURN QUERY SELECT s.key, s.codec, s.key_id, s.value, s.updated_at FROM queen.stream_state s
            WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
                AND s.key >= p_from AND s.key < p_to
            ORDER BY s.key;
    END IF;
END
$$;
