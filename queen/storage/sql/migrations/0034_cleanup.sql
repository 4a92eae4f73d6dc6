-- Partitions that go: those long empty by themselves, any by order; and what of this migration's tables goes with a queue.

-- Remove partitions with all that hangs on them. The caller has locked their rows FOR UPDATE and dropped their traces. Sums
-- go down by what was theirs. A push makes a partition of that name anew, with the same id, from offset 0.
CREATE OR REPLACE FUNCTION queen.remove_partitions(p_bucket integer, p_ids uuid[]) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
BEGIN
    PERFORM FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = ANY (p_ids)
    ORDER BY c.partition_id, c.group_name FOR UPDATE;
    WITH gone AS (
        DELETE FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = ANY (p_ids)
        RETURNING c.queue_id, c.group_name, c.committed
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 5, g.queue_id, -sum(g.committed), g.group_name FROM gone g
    GROUP BY g.queue_id, g.group_name HAVING sum(g.committed) > 0;
    WITH gone AS (
        DELETE FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = ANY (p_ids)
        RETURNING d.queue_id, d.group_name
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 6, g.queue_id, -count(*), g.group_name FROM gone g GROUP BY g.queue_id, g.group_name;
    DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = ANY (p_ids);
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = ANY (p_ids);
    DELETE FROM queen.expired_ranges e WHERE e.bucket = p_bucket AND e.partition_id = ANY (p_ids);
    PERFORM queen.forget_stream_partitions(p_bucket, p_ids);
    WITH gone AS (
        DELETE FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = ANY (p_ids)
        RETURNING p.queue_id, p.next_offset, p.first_offset, p.erased
    ), changes AS (
        SELECT 1::smallint AS kind, g.queue_id, -sum(g.next_offset) AS amount FROM gone g GROUP BY g.queue_id
        UNION ALL SELECT 2::smallint, g.queue_id, -sum(g.first_offset) FROM gone g GROUP BY g.queue_id
        UNION ALL SELECT 3::smallint, g.queue_id, -sum(g.erased) FROM gone g GROUP BY g.queue_id
        UNION ALL SELECT 4::smallint, g.queue_id, -count(*) FROM gone g GROUP BY g.queue_id
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, c.kind, c.queue_id, c.amount, '' FROM changes c WHERE c.amount <> 0;
END
$$;

-- One bounded step of removing partitions that have been empty since before p_before. What still means something stays, and
-- is looked at again as long from now: partitions with dead letters, with a live lease, with what a stream remembers, and
-- the Default one, which every queue has. Returns how many entries it has dealt with; below p_limit there are no more.
CREATE OR REPLACE FUNCTION queen.clean_partitions(
    p_bucket integer, p_now timestamptz, p_before timestamptz, p_limit integer
) RETURNS TABLE (looked_at integer, removed integer) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_sort = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    p record;
    v_ids uuid[] := '{}';
    v_traces integer;
BEGIN
    looked_at := 0; removed := 0;
    FOR p IN
        SELECT pa.partition_id, pa.name, pa.oldest_at FROM queen.partitions pa
        WHERE pa.bucket = p_bucket AND pa.emptied_at < p_before
        ORDER BY pa.emptied_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
        looked_at := looked_at + 1;
        IF p.oldest_at IS NOT NULL THEN  -- filled again since
            UPDATE queen.partitions pa SET emptied_at = NULL
            WHERE pa.bucket = p_bucket AND pa.partition_id = p.partition_id;
        ELSIF p.name = 'Default'
            OR EXISTS (SELECT FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = p.partition_id)
            OR EXISTS (SELECT FROM queen.expired_ranges e WHERE e.bucket = p_bucket AND e.partition_id = p.partition_id)
            OR EXISTS (SELECT FROM queen.stream_partitions s
                WHERE s.bucket = p_bucket AND s.partition_id = p.partition_id)
            OR EXISTS (SELECT FROM queen.cursors c
                WHERE c.bucket = p_bucket AND c.partition_id = p.partition_id AND c.lease_expires_at > v_now)
        THEN
            UPDATE queen.partitions pa SET emptied_at = v_now
            WHERE pa.bucket = p_bucket AND pa.partition_id = p.partition_id;
        ELSE
            v_traces := queen.drop_traces(p_bucket, ARRAY[p.partition_id], NULL, NULL, 1000);
            EXIT WHEN v_traces = 1000;  -- more than one step removes: the next goes on here
            v_ids := v_ids || p.partition_id;
        END IF;
    END LOOP;
    PERFORM queen.remove_partitions(p_bucket, v_ids);
    removed := cardinality(v_ids);
    RETURN NEXT;
END
$$;

-- Remove one partition, whatever is in it. Returns the messages that went, NULL when there is no such partition, and -1 when
-- it has more traces than one step removes: again, then.
CREATE OR REPLACE FUNCTION queen.drop_partition(p_bucket integer, p_queue_id uuid, p_partition_id uuid) RETURNS bigint
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
    v_queue_id uuid;                -- by itself: with it in the condition a plan may go by queue
    v_messages bigint;
BEGIN
    SELECT p.queue_id, p.next_offset - p.first_offset - p.erased INTO v_queue_id, v_messages FROM queen.partitions p
    WHERE p.bucket = p_bucket AND p.partition_id = p_partition_id FOR UPDATE;
    IF v_queue_id IS DISTINCT FROM p_queue_id THEN
        RETURN NULL;
    END IF;
    IF queen.drop_traces(p_bucket, ARRAY[p_partition_id], NULL, NULL, 1000) = 1000 THEN
        RETURN -1;
    END IF;
    PERFORM queen.remove_partitions(p_bucket, ARRAY[p_partition_id]);
    RETURN v_messages;
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
    DELETE FROM queen.queue_rooms r WHERE r.bucket = p_bucket AND r.queue_id = p_queue_id;
    DELETE FROM queen.queue_sweeps w WHERE w.bucket = p_bucket AND w.queue_id = p_queue_id;  -- 0035_sweeps.sql
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
    DELETE FROM queen.expired_ranges e WHERE e.bucket = p_bucket AND e.partition_id = ANY (v_ids);
    PERFORM queen.forget_stream_partitions(p_bucket, v_ids);
    DELETE FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids);
    IF coalesce(cardinality(v_ids), 0) = 0 THEN
        DELETE FROM queen.counts t WHERE t.bucket = p_bucket AND t.queue_id = p_queue_id;
        DELETE FROM queen.count_changes t WHERE t.bucket = p_bucket AND t.queue_id = p_queue_id;
    END IF;
    RETURN coalesce(cardinality(v_ids), 0);
END
$$;

-- One bounded step of emptying a queue, or one partition of it (p_partition_id): what was stored before p_before goes from
-- up to p_limit partitions, and with it their dead letters; cursors stand at the end, leases are over. Returns the
-- messages removed and the partitions that were emptied.
CREATE OR REPLACE FUNCTION queen.clear_step(
    p_bucket integer, p_queue_id uuid, p_partition_id uuid, p_before timestamptz, p_limit integer
) RETURNS TABLE (removed bigint, partitions integer) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_ids uuid[];
BEGIN
    v_ids := ARRAY(
        SELECT p.partition_id FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id AND p.oldest_at <= p_before
            AND (p_partition_id IS NULL OR p.partition_id = p_partition_id)
        ORDER BY p.oldest_at LIMIT p_limit);
    -- in the order of every lock, and only what is still to be emptied
    v_ids := ARRAY(
        SELECT p.partition_id FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids) AND p.oldest_at <= p_before
        ORDER BY p.partition_id FOR NO KEY UPDATE);
    WITH held AS (
        SELECT given.partition_id, c.group_name, c.committed, p.next_offset
        FROM unnest(v_ids) AS given (partition_id)
        CROSS JOIN LATERAL (
            SELECT pa.next_offset FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.partition_id = given.partition_id LIMIT 1
        ) p
        CROSS JOIN LATERAL (
            SELECT cu.group_name, cu.committed FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.partition_id = given.partition_id
            ORDER BY cu.group_name OFFSET 0 FOR NO KEY UPDATE
        ) c
    ), moved AS (
        -- the rows are there, and locked: this finds each by its key
        INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed)
        SELECT p_bucket, held.partition_id, held.group_name, p_queue_id, held.next_offset FROM held
        ON CONFLICT ON CONSTRAINT cursors_pkey DO UPDATE SET committed = excluded.committed, ready_at = NULL,
            skips = NULL, lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL,
            lease_epoch = NULL, acked = NULL, retry_count = 0, attempt = 0
    ), emptied AS (
        SELECT p.next_offset - p.first_offset AS removed, p.erased FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids)
    ), changes AS (
        SELECT 5::smallint AS kind, sum(h.next_offset - h.committed) AS amount, h.group_name FROM held h
        GROUP BY h.group_name
        UNION ALL SELECT 2::smallint, sum(e.removed), '' FROM emptied e
        UNION ALL SELECT 3::smallint, -sum(e.erased), '' FROM emptied e
    ), counted AS (
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, c.kind, p_queue_id, c.amount, c.group_name FROM changes c WHERE c.amount <> 0
    )
    SELECT coalesce(sum(e.removed - e.erased), 0), count(*) INTO removed, partitions FROM emptied e;
    UPDATE queen.partitions p SET first_offset = p.next_offset, oldest_at = NULL, keyed_min = NULL, keyed_max = NULL,
        erased = 0, emptied_at = v_now
    WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids);
    DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = ANY (v_ids);
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = ANY (v_ids);
    RETURN NEXT;
END
$$;

-- Move what was counted since into counts. Nobody else folds the bucket at the same time: the caller holds its advisory
-- lock. What belongs to a queue that is gone is dropped. Returns how many rows were folded, and for the queues
-- concerned how many partitions came and went.
CREATE OR REPLACE FUNCTION queen.fold_counts(p_bucket integer, p_now timestamptz)
RETURNS TABLE (folded bigint, queue_names text[], created bigint[], deleted bigint[]) LANGUAGE plpgsql
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    WITH gone AS (
        DELETE FROM queen.count_changes c WHERE c.bucket = p_bucket
        RETURNING c.kind, c.queue_id, c.amount, c.group_name
    ), merged AS (
        INSERT INTO queen.counts AS t (bucket, queue_id, group_name, stored, removed, erased, partitions, consumed,
            dead_letters, stored_at)
        SELECT p_bucket, g.queue_id, g.group_name,
            coalesce(sum(g.amount) FILTER (WHERE g.kind = 1), 0), coalesce(sum(g.amount) FILTER (WHERE g.kind = 2), 0),
            coalesce(sum(g.amount) FILTER (WHERE g.kind = 3), 0), coalesce(sum(g.amount) FILTER (WHERE g.kind = 4), 0),
            coalesce(sum(g.amount) FILTER (WHERE g.kind = 5), 0), coalesce(sum(g.amount) FILTER (WHERE g.kind = 6), 0),
            CASE WHEN bool_or(g.kind = 1 AND g.amount > 0) THEN v_now END
        FROM gone g JOIN queen.queues q ON q.queue_id = g.queue_id
        GROUP BY g.queue_id, g.group_name
        ORDER BY g.queue_id, g.group_name
        ON CONFLICT ON CONSTRAINT counts_pkey DO UPDATE SET
            stored = t.stored + excluded.stored, removed = t.removed + excluded.removed,
            erased = t.erased + excluded.erased, partitions = t.partitions + excluded.partitions,
            consumed = t.consumed + excluded.consumed, dead_letters = t.dead_letters + excluded.dead_letters,
            stored_at = coalesce(excluded.stored_at, t.stored_at)
    ), births AS (
        SELECT q.name, coalesce(sum(g.amount) FILTER (WHERE g.amount > 0), 0)::bigint AS created,
            coalesce(-sum(g.amount) FILTER (WHERE g.amount < 0), 0)::bigint AS deleted
        FROM gone g JOIN queen.queues q ON q.queue_id = g.queue_id WHERE g.kind = 4 GROUP BY q.name
    )
    SELECT (SELECT count(*) FROM gone), array_agg(b.name), array_agg(b.created), array_agg(b.deleted)
    INTO folded, queue_names, created, deleted FROM births b;
    RETURN NEXT;
END
$$;
