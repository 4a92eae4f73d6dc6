-- Options that apply only when somebody has asked for them, and the size limit of a queue.

-- Whether ttl and retryDelay were asked for. Their defaults are stored and echoed like those of the other options, and do
-- nothing: a client that never heard of them must not lose messages to them.
ALTER TABLE queen.queues
    ADD COLUMN ttl_enforced boolean NOT NULL DEFAULT false,
    ADD COLUMN retry_delay_enforced boolean NOT NULL DEFAULT false;

-- Create a queue or replace its options; see 0005_queues.sql.
CREATE OR REPLACE FUNCTION queen.configure(
    p_now timestamptz, p_only_if_missing boolean, p_queue_id uuid, p_name text, p_namespace text, p_task text,
    p_lease_seconds integer, p_retry_limit integer, p_retry_delay_ms integer, p_priority integer,
    p_delayed_processing_seconds integer, p_window_buffer_seconds integer, p_max_size integer, p_ttl_seconds integer,
    p_dead_letter_queue boolean, p_dlq_after_max_retries boolean, p_retention_enabled boolean,
    p_retention_seconds integer, p_completed_retention_seconds integer, p_max_wait_time_seconds integer,
    p_encryption_enabled boolean, p_ttl_enforced boolean, p_retry_delay_enforced boolean
) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_queue_id uuid;
BEGIN
    IF p_only_if_missing THEN
        SELECT q.queue_id INTO v_queue_id FROM queen.queues q WHERE q.name = p_name;
        IF FOUND THEN
            RETURN v_queue_id;
        END IF;
    END IF;
    INSERT INTO queen.queues AS q (queue_id, name, namespace, task, version, lease_seconds, retry_limit, retry_delay_ms,
        priority, delayed_processing_seconds, window_buffer_seconds, max_size, ttl_seconds, dead_letter_queue,
        dlq_after_max_retries, retention_enabled, retention_seconds, completed_retention_seconds,
        max_wait_time_seconds, encryption_enabled, ttl_enforced, retry_delay_enforced, created_at)
    VALUES (p_queue_id, p_name, p_namespace, p_task, 1, p_lease_seconds, p_retry_limit, p_retry_delay_ms, p_priority,
        p_delayed_processing_seconds, p_window_buffer_seconds, p_max_size, p_ttl_seconds, p_dead_letter_queue,
        p_dlq_after_max_retries, p_retention_enabled, p_retention_seconds, p_completed_retention_seconds,
        p_max_wait_time_seconds, p_encryption_enabled, p_ttl_enforced, p_retry_delay_enforced, v_now)
    ON CONFLICT ON CONSTRAINT queues_name_unique DO UPDATE SET
        namespace = excluded.namespace, task = excluded.task, version = q.version + 1,
        lease_seconds = excluded.lease_seconds, retry_limit = excluded.retry_limit,
        retry_delay_ms = excluded.retry_delay_ms, priority = excluded.priority,
        delayed_processing_seconds = excluded.delayed_processing_seconds,
        window_buffer_seconds = excluded.window_buffer_seconds, max_size = excluded.max_size,
        ttl_seconds = excluded.ttl_seconds, dead_letter_queue = excluded.dead_letter_queue,
        dlq_after_max_retries = excluded.dlq_after_max_retries, retention_enabled = excluded.retention_enabled,
        retention_seconds = excluded.retention_seconds,
        completed_retention_seconds = excluded.completed_retention_seconds,
        max_wait_time_seconds = excluded.max_wait_time_seconds, encryption_enabled = excluded.encryption_enabled,
        ttl_enforced = excluded.ttl_enforced, retry_delay_enforced = excluded.retry_delay_enforced
        WHERE NOT p_only_if_missing
    RETURNING q.queue_id INTO v_queue_id;
    IF v_queue_id IS NULL THEN  -- another session created it between our look and our insert
        SELECT q.queue_id INTO v_queue_id FROM queen.queues q WHERE q.name = p_name;
    END IF;
    RETURN v_queue_id;
END
$$;

-- The same for a server that does not know the last two yet.
CREATE OR REPLACE FUNCTION queen.configure(
    p_now timestamptz, p_only_if_missing boolean, p_queue_id uuid, p_name text, p_namespace text, p_task text,
    p_lease_seconds integer, p_retry_limit integer, p_retry_delay_ms integer, p_priority integer,
    p_delayed_processing_seconds integer, p_window_buffer_seconds integer, p_max_size integer, p_ttl_seconds integer,
    p_dead_letter_queue boolean, p_dlq_after_max_retries boolean, p_retention_enabled boolean,
    p_retention_seconds integer, p_completed_retention_seconds integer, p_max_wait_time_seconds integer,
    p_encryption_enabled boolean
) RETURNS uuid LANGUAGE sql AS $$
    SELECT queen.configure(p_now, p_only_if_missing, p_queue_id, p_name, p_namespace, p_task, p_lease_seconds,
        p_retry_limit, p_retry_delay_ms, p_priority, p_delayed_processing_seconds, p_window_buffer_seconds, p_max_size,
        p_ttl_seconds, p_dead_letter_queue, p_dlq_after_max_retries, p_retention_enabled, p_retention_seconds,
        p_completed_retention_seconds, p_max_wait_time_seconds, p_encryption_enabled, false, false)
$$;

-- How much room there is in a queue with a size limit, as pushes keep it: one row a queue, in the bucket of its id.
-- `room` is right as of `looked_at`, less what was pushed since; messages consumed since are not in it, so that there may
-- be more room than it says. Written after partitions and cursors, last of all locks.
CREATE TABLE queen.queue_rooms (
    bucket integer NOT NULL,
    queue_id uuid NOT NULL,
    version bigint NOT NULL,
    room bigint NOT NULL,
    looked_at timestamptz NOT NULL,
    CONSTRAINT queue_rooms_pkey PRIMARY KEY (bucket, queue_id)
) WITH (fillfactor = 50);

-- The size of a queue: messages stored that the slowest of its groups has not consumed; all that are stored while it has
-- no group. From the sums that are kept, all buckets of them.
CREATE OR REPLACE FUNCTION queen.queue_size(p_buckets integer[], p_queue_id uuid) RETURNS bigint LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_size bigint;
BEGIN
    WITH counted AS (
        SELECT c.group_name, c.stored, c.removed, c.erased, c.consumed
        FROM unnest(p_buckets) AS given (bucket)
        CROSS JOIN LATERAL (
            SELECT t.* FROM queen.counts t WHERE t.bucket = given.bucket AND t.queue_id = p_queue_id OFFSET 0
        ) c
        UNION ALL
        SELECT c.group_name, CASE c.kind WHEN 1 THEN c.amount ELSE 0 END, CASE c.kind WHEN 2 THEN c.amount ELSE 0 END,
            CASE c.kind WHEN 3 THEN c.amount ELSE 0 END, CASE c.kind WHEN 5 THEN c.amount ELSE 0 END
        FROM queen.count_changes c WHERE c.bucket = ANY (p_buckets) AND c.queue_id = p_queue_id
    ), sums AS (
        SELECT c.group_name, sum(c.stored) AS stored, sum(c.removed) AS removed, sum(c.erased) AS erased,
            sum(c.consumed) AS consumed
        FROM counted c GROUP BY c.group_name
    )
    SELECT least(own.stored - greatest(slowest.consumed, own.removed), own.stored - own.removed - own.erased)
    INTO v_size
    FROM sums own
    CROSS JOIN (
        SELECT min(coalesce(s.consumed, 0)) AS consumed FROM queen.consumer_groups g
        LEFT JOIN sums s ON s.group_name = g.name WHERE g.queue_id = p_queue_id
    ) slowest
    WHERE own.group_name = '';
    RETURN greatest(coalesce(v_size, 0), 0);
END
$$;

-- Take room for messages that this transaction has stored. NULL: there was enough, or the queue has no limit. Else how much
-- there is, and the caller rolls back. Pushes to one limited queue come one after the other from here to their commit.
-- The row is believed for a second; after that, and whenever it says no, the sums are asked.
CREATE OR REPLACE FUNCTION queen.reserve(
    p_bucket integer, p_now timestamptz, p_buckets integer[], p_queue_id uuid, p_wanted bigint
) RETURNS bigint LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
    c_believed constant interval := '1 second';
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_queue record;
    v_known record;
    v_room bigint;
BEGIN
    SELECT q.max_size, q.version INTO v_queue FROM queen.queues q WHERE q.queue_id = p_queue_id;
    IF NOT FOUND OR v_queue.max_size <= 0 OR p_wanted <= 0 THEN
        RETURN NULL;
    END IF;
    LOOP
        SELECT r.version, r.room, r.looked_at INTO v_known FROM queen.queue_rooms r
        WHERE r.bucket = p_bucket AND r.queue_id = p_queue_id FOR NO KEY UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO queen.queue_rooms (bucket, queue_id, version, room, looked_at)
        VALUES (p_bucket, p_queue_id, 0, 0, '-infinity')
        ON CONFLICT ON CONSTRAINT queue_rooms_pkey DO NOTHING;
    END LOOP;
    IF v_known.version = v_queue.version AND v_known.room >= p_wanted AND v_known.looked_at > v_now - c_believed THEN
        UPDATE queen.queue_rooms r SET room = v_known.room - p_wanted
        WHERE r.bucket = p_bucket AND r.queue_id = p_queue_id;
        RETURN NULL;
    END IF;
    v_room := v_queue.max_size - queen.queue_size(p_buckets, p_queue_id);  -- what this transaction stored is in it
    IF v_room < 0 THEN
        RETURN greatest(v_room + p_wanted, 0);
    END IF;
    UPDATE queen.queue_rooms r SET version = v_queue.version, room = v_room, looked_at = v_now
    WHERE r.bucket = p_bucket AND r.queue_id = p_queue_id;
    RETURN NULL;
END
$$;
