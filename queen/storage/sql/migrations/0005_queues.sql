-- Queues, consumer groups and the bounded steps of housekeeping.

-- Create a queue or replace its options. With p_only_if_missing an existing queue is left as it is (implicit
-- creation by a push). Returns the queue's id; its row has the rest.
CREATE OR REPLACE FUNCTION queen.configure(
    p_now timestamptz, p_only_if_missing boolean, p_queue_id uuid, p_name text, p_namespace text, p_task text,
    p_lease_seconds integer, p_retry_limit integer, p_retry_delay_ms integer, p_priority integer,
    p_delayed_processing_seconds integer, p_window_buffer_seconds integer, p_max_size integer, p_ttl_seconds integer,
    p_dead_letter_queue boolean, p_dlq_after_max_retries boolean, p_retention_enabled boolean,
    p_retention_seconds integer, p_completed_retention_seconds integer, p_max_wait_time_seconds integer,
    p_encryption_enabled boolean
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
        max_wait_time_seconds, encryption_enabled, created_at)
    VALUES (p_queue_id, p_name, p_namespace, p_task, 1, p_lease_seconds, p_retry_limit, p_retry_delay_ms, p_priority,
        p_delayed_processing_seconds, p_window_buffer_seconds, p_max_size, p_ttl_seconds, p_dead_letter_queue,
        p_dlq_after_max_retries, p_retention_enabled, p_retention_seconds, p_completed_retention_seconds,
        p_max_wait_time_seconds, p_encryption_enabled, v_now)
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
        max_wait_time_seconds = excluded.max_wait_time_seconds, encryption_enabled = excluded.encryption_enabled
        WHERE NOT p_only_if_missing
    RETURNING q.queue_id INTO v_queue_id;
    IF v_queue_id IS NULL THEN  -- another session created it between our look and our insert
        SELECT q.queue_id INTO v_queue_id FROM queen.queues q WHERE q.name = p_name;
    END IF;
    RETURN v_queue_id;
END
$$;

-- The part of configure that belongs to one bucket: the lock row, the Default partition where it lives here
-- (p_partition_id NULL: it does not), and cursors that an old delay or window had put off.
CREATE OR REPLACE FUNCTION queen.configure_bucket(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_partition_id uuid, p_partition_name text
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    INSERT INTO queen.queue_buckets (bucket, queue_id) VALUES (p_bucket, p_queue_id)
    ON CONFLICT ON CONSTRAINT queue_buckets_pkey DO NOTHING;
    IF p_partition_id IS NOT NULL THEN
        PERFORM FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id FOR SHARE;
        WITH born AS (
            INSERT INTO queen.partitions AS p (bucket, partition_id, queue_id, name, created_at)
            VALUES (p_bucket, p_partition_id, p_queue_id, p_partition_name, v_now)
            ON CONFLICT ON CONSTRAINT partitions_pkey DO NOTHING
            RETURNING p.partition_id
        ), counted AS (
            INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
            SELECT p_bucket, 4, p_queue_id, 1, '' FROM born
        )
        INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed)
        SELECT p_bucket, born.partition_id, g.name, p_queue_id, 0
        FROM born JOIN queen.consumer_groups g ON g.queue_id = p_queue_id
        ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING;
    END IF;
    UPDATE queen.cursors c SET ready_at = v_now
    FROM (
        SELECT cu.partition_id, cu.group_name FROM queen.cursors cu
        WHERE cu.bucket = p_bucket AND cu.queue_id = p_queue_id AND cu.ready_at > v_now AND cu.lease_id IS NULL
        ORDER BY cu.partition_id, cu.group_name FOR NO KEY UPDATE
    ) put_off
    WHERE c.bucket = p_bucket AND c.partition_id = put_off.partition_id AND c.group_name = put_off.group_name;
END
$$;

-- Register a group on a queue (reference rows): what is stored already wins. False when the queue is gone.
CREATE OR REPLACE FUNCTION queen.register_group(
    p_now timestamptz, p_queue_id uuid, p_group text, p_mode text, p_start_at timestamptz
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    PERFORM FROM queen.queues q WHERE q.queue_id = p_queue_id;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO queen.consumer_groups (queue_id, name, mode, start_at, floor_at, created_at)
    SELECT p_queue_id, p_group, p_mode, start.at, start.at, v_now
    FROM (SELECT CASE p_mode WHEN 'new' THEN coalesce(p_start_at, v_now) + interval '1 microsecond'
        WHEN 'from' THEN p_start_at END AS at) start
    ON CONFLICT ON CONSTRAINT consumer_groups_pkey DO NOTHING;
    RETURN true;
END
$$;

-- The offsets of deleted messages of a partition, from p_first on; NULL when there are none.
CREATE OR REPLACE FUNCTION queen.erased_from(p_bucket integer, p_partition_id uuid, p_first bigint)
RETURNS int8multirange LANGUAGE sql STABLE AS $$
    SELECT range_agg(int8range(s.base_offset + place, s.base_offset + place + 1))
    FROM queen.segments s CROSS JOIN LATERAL unnest(s.erased) AS place
    WHERE s.bucket = p_bucket AND s.partition_id = p_partition_id AND s.erased IS NOT NULL
        AND s.base_offset + place >= p_first
$$;

-- The part of a registration that belongs to one bucket: a cursor in every partition of the queue.
-- Partitions are locked first, so no push is between its look for idle cursors and its commit; then the lock
-- row, so that no partition is being born; partitions born in between are seen and locked by the second pass.
CREATE OR REPLACE FUNCTION queen.register_group_bucket(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_group text
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_start timestamptz;
BEGIN
    PERFORM FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id FOR UPDATE;
    PERFORM FROM queen.partitions p WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id
    ORDER BY p.partition_id FOR SHARE;
    SELECT g.start_at INTO v_start FROM queen.consumer_groups g WHERE g.queue_id = p_queue_id AND g.name = p_group;
    -- a start in the future or now has nothing stored that is for it; an older one is found at the first claim
    WITH born AS (
        INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed, ready_at, skips)
        SELECT p_bucket, p.partition_id, p_group, p_queue_id, at.first,
            CASE WHEN at.first < p.next_offset THEN v_now END,
            CASE WHEN p.erased > 0 THEN queen.erased_from(p_bucket, p.partition_id, at.first) END
        FROM queen.partitions p
        CROSS JOIN LATERAL (
            SELECT CASE WHEN p.last_created_at < v_start THEN p.next_offset ELSE p.first_offset END AS first
        ) at
        WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id
        ORDER BY p.partition_id
        ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING
        RETURNING c.committed
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 5, p_queue_id, sum(born.committed), p_group FROM born HAVING sum(born.committed) > 0;
END
$$;

-- Delete a queue: after this nobody can reach it; its data goes in bounded steps of queen.purge.
CREATE OR REPLACE FUNCTION queen.delete_queue(p_now timestamptz, p_name text) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    v_queue_id uuid;
BEGIN
    DELETE FROM queen.queues q WHERE q.name = p_name RETURNING q.queue_id INTO v_queue_id;
    IF FOUND THEN
        DELETE FROM queen.consumer_groups g WHERE g.queue_id = v_queue_id;
        INSERT INTO queen.deleted_queues (queue_id, name, deleted_at)
        VALUES (v_queue_id, p_name, coalesce(p_now, clock_timestamp()));
    END IF;
    RETURN v_queue_id;
END
$$;

-- Remove up to p_limit partitions of a deleted queue from one bucket, with all that hangs on them. Returns how many
-- went; 0 when there is nothing left.
CREATE OR REPLACE FUNCTION queen.purge(p_bucket integer, p_queue_id uuid, p_limit integer)
RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
DECLARE
    v_ids uuid[];
BEGIN
    DELETE FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id;
    v_ids := ARRAY(
        SELECT p.partition_id FROM queen.partitions p WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id
        ORDER BY p.partition_id LIMIT p_limit FOR UPDATE);
    IF queen.drop_traces(p_bucket, v_ids, NULL, NULL, 1000) = 1000 THEN
        RETURN 1;  -- these partitions have more traces than one step removes
    END IF;
    DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = ANY (v_ids);
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = ANY (v_ids);
    DELETE FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = ANY (v_ids);
    DELETE FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = ANY (v_ids);
    PERFORM queen.forget_stream_partitions(p_bucket, v_ids);
    DELETE FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids);
    IF coalesce(cardinality(v_ids), 0) = 0 THEN
        DELETE FROM queen.counts t WHERE t.bucket = p_bucket AND t.queue_id = p_queue_id;
        DELETE FROM queen.count_changes t WHERE t.bucket = p_bucket AND t.queue_id = p_queue_id;
    END IF;
    RETURN coalesce(cardinality(v_ids), 0);
END
$$;

-- Move the cursors of a partition that lag behind p_until to it: what they had before them is removed. The caller
-- holds the partition's lock. A cursor with nothing left is found idle by the next claim.
CREATE OR REPLACE FUNCTION queen.pass_removed(
    p_bucket integer, p_queue_id uuid, p_partition_id uuid, p_until bigint
) RETURNS void LANGUAGE sql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
    WITH lagging AS (
        SELECT c.group_name, c.committed FROM queen.cursors c
        WHERE c.bucket = p_bucket AND c.partition_id = p_partition_id AND c.committed < p_until
        ORDER BY c.group_name FOR NO KEY UPDATE
    ), moved AS (
        UPDATE queen.cursors c SET committed = p_until, skips = queen.skips_from(c.skips, p_until)
        FROM lagging
        WHERE c.bucket = p_bucket AND c.partition_id = p_partition_id AND c.group_name = lagging.group_name
        RETURNING c.group_name, p_until - lagging.committed AS distance
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 5, p_queue_id, sum(moved.distance), moved.group_name FROM moved GROUP BY moved.group_name
$$;

-- One bounded step of retention in one bucket and queue: remove whole segments from the head of up to p_limit
-- partitions. Messages created before p_before go; those created before p_completed_before go when every group has
-- consumed them. What is under a live lease stays. Returns the messages removed, the partitions
-- looked at, and where the next step goes on.
CREATE OR REPLACE FUNCTION queen.expire(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_before timestamptz, p_completed_before timestamptz,
    p_after timestamptz, p_after_id uuid, p_limit integer
) RETURNS TABLE (removed bigint, partitions integer, last_oldest timestamptz, last_id uuid) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_partition record;
    v_leased bigint;
    v_consumed bigint;
    v_until bigint;
    v_first bigint;
    v_oldest timestamptz;
    v_erased integer;
    v_erased_total bigint := 0;
BEGIN
    removed := 0; partitions := 0;
    FOR v_partition IN
        SELECT p.partition_id, p.first_offset, p.next_offset, p.oldest_at FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id AND p.oldest_at >= p_after
            AND (p.oldest_at, p.partition_id) > (p_after, p_after_id)
            AND p.oldest_at < greatest(p_before, p_completed_before)
        ORDER BY p.oldest_at, p.partition_id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        partitions := partitions + 1;
        last_oldest := v_partition.oldest_at; last_id := v_partition.partition_id;
        SELECT min(c.lease_first) FILTER (WHERE c.lease_expires_at > v_now), min(c.committed)
        INTO v_leased, v_consumed
        FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = v_partition.partition_id;
        -- the end of the last segment that may go
        SELECT s.base_offset, s.created_at INTO v_first, v_oldest FROM queen.segments s
        WHERE s.bucket = p_bucket AND s.partition_id = v_partition.partition_id
            AND NOT (
                (s.created_at < coalesce(p_before, '-infinity')
                    OR (s.created_at < coalesce(p_completed_before, '-infinity')
                        AND s.base_offset + s.message_count <= coalesce(v_consumed, 0)))
                AND s.base_offset + s.message_count <= coalesce(v_leased, v_partition.next_offset)
            )
        ORDER BY s.base_offset LIMIT 1;
        v_until := CASE WHEN FOUND THEN v_first ELSE v_partition.next_offset END;
        IF v_until > v_partition.first_offset THEN
            WITH gone AS (
                DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = v_partition.partition_id
                    AND s.base_offset < v_until
                RETURNING s.erased
            )
            SELECT coalesce(sum(cardinality(gone.erased)), 0) INTO v_erased FROM gone;
            v_erased_total := v_erased_total + v_erased;
            DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket
                AND t.partition_id = v_partition.partition_id AND t.message_offset < v_until;
            -- cursors never lag behind what is stored: the counts rely on it
            PERFORM queen.pass_removed(p_bucket, p_queue_id, v_partition.partition_id, v_until);
            UPDATE queen.partitions p SET first_offset = v_until, erased = p.erased - v_erased,
                oldest_at = CASE WHEN v_until < p.next_offset THEN v_oldest END
            WHERE p.bucket = p_bucket AND p.partition_id = v_partition.partition_id;
            removed := removed + v_until - v_partition.first_offset;
        END IF;
    END LOOP;
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, change.kind, p_queue_id, change.amount, ''
    FROM (VALUES (2::smallint, removed), (3::smallint, -v_erased_total)) AS change (kind, amount)
    WHERE change.amount <> 0;
    RETURN NEXT;
END
$$;
