-- Single messages: seen, deleted, set aside; queues emptied.

-- Serves the dead letter list of all queues, newest failure first.
CREATE INDEX dead_letters_by_time ON queen.dead_letters (bucket, failed_at);

-- Serves the dead letter list of a group.
CREATE INDEX dead_letters_by_group ON queen.dead_letters (bucket, group_name, failed_at);

-- What the newest dead letters are about. (Sorting all of them would look cheaper than following the index.)
CREATE OR REPLACE FUNCTION queen.newest_dead_letters(p_bucket integer, p_most integer)
RETURNS TABLE (partition_id uuid, error text) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.partition_id, left(d.error, 200) FROM queen.dead_letters d
        WHERE d.bucket = p_bucket ORDER BY d.failed_at DESC LIMIT p_most;
END
$$;

-- Partitions in which to look for recent messages of queues: all of a queue if there are no more than p_most that hold any,
-- else half of that from those that have something for some group, the latest news first, and half from those whose
-- oldest message is the youngest. (An index by the time of the last push would cost every push.)
CREATE OR REPLACE FUNCTION queen.partitions_to_look_at(p_bucket integer, p_queue_ids uuid[], p_most integer)
RETURNS TABLE (
    partition_id uuid, queue_id uuid, name text, first_offset bigint, next_offset bigint, last_created_at timestamptz
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_ids uuid[];
    v_groups text[];
BEGIN
    FOR i IN 1 .. cardinality(p_queue_ids) LOOP
        v_ids := ARRAY(
            SELECT p.partition_id FROM queen.partitions p
            WHERE p.bucket = p_bucket AND p.queue_id = p_queue_ids[i] AND p.oldest_at IS NOT NULL
            ORDER BY p.oldest_at DESC LIMIT p_most + 1);
        IF cardinality(v_ids) > p_most THEN
            v_ids := v_ids[1 : p_most / 2];
            v_groups := ARRAY(SELECT g.name FROM queen.consumer_groups g WHERE g.queue_id = p_queue_ids[i] LIMIT p_most);
            FOR j IN 1 .. cardinality(v_groups) LOOP
                v_ids := v_ids || ARRAY(
                    SELECT c.partition_id FROM queen.cursors c
                    WHERE c.bucket = p_bucket AND c.queue_id = p_queue_ids[i] AND c.group_name = v_groups[j]
                        AND c.ready_at IS NOT NULL
                    ORDER BY c.ready_at DESC LIMIT greatest(p_most / 2 / cardinality(v_groups), 1));
            END LOOP;
        END IF;
        RETURN QUERY
            SELECT p.partition_id, p.queue_id, p.name, p.first_offset, p.next_offset, p.last_created_at
            FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids);
    END LOOP;
END
$$;

-- The newest segments of partitions, without their bodies: those created from p_from to p_to, at most p_most of each, of
-- offsets below p_below.
CREATE OR REPLACE FUNCTION queen.newest_segments(
    p_bucket integer, p_partition_ids uuid[], p_below bigint[], p_from timestamptz, p_to timestamptz, p_most integer
) RETURNS TABLE (
    part integer, base_offset bigint, message_count integer, created_at timestamptz, raw_bytes integer,
    erased integer[]
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT given.part::integer, s.base_offset, s.message_count, s.created_at, s.raw_bytes, s.erased
        FROM unnest(p_partition_ids, p_below) WITH ORDINALITY AS given (partition_id, below, part)
        CROSS JOIN LATERAL (
            SELECT pa.* FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.partition_id = given.partition_id
                AND pa.last_created_at >= p_from AND pa.oldest_at <= p_to LIMIT 1
        ) p
        CROSS JOIN LATERAL (
            SELECT CASE WHEN p.last_created_at <= p_to THEN given.below
                ELSE least(given.below,
                    queen.offset_after(p_bucket, p.partition_id, p.first_offset, p.next_offset, p_to)) END AS below
        ) window_end
        CROSS JOIN LATERAL (
            SELECT seg.base_offset, seg.message_count, seg.created_at, seg.raw_bytes, seg.erased
            FROM queen.segments seg
            WHERE seg.bucket = p_bucket AND seg.partition_id = given.partition_id
                AND seg.base_offset < window_end.below
            ORDER BY seg.base_offset DESC LIMIT p_most
        ) s
        WHERE s.created_at >= p_from;
END
$$;

-- Erase one message: its line is empty in p_body, the new body of its segment; its offset stays as a gap that cursors
-- skip. Its dead letters go with it. The caller holds the lock of the partition and has read the segment under it.
-- One row for each group that had it under a lease which is complete without it, and is over: p_now ready.
CREATE OR REPLACE FUNCTION queen.erase_message(
    p_bucket integer, p_now timestamptz, p_partition_id uuid, p_base_offset bigint, p_place integer,
    p_transaction_key bytea, p_transaction_ids bytea, p_codec smallint, p_raw_bytes integer, p_key_id text, p_body bytea
) RETURNS SETOF text LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_offset bigint := p_base_offset + p_place;
    v_queue_id uuid;
    c record;
BEGIN
    UPDATE queen.segments s SET body = p_body, codec = p_codec, raw_bytes = p_raw_bytes, key_id = p_key_id,
        transaction_ids = p_transaction_ids, erased = coalesce(s.erased, '{}') || p_place
    WHERE s.bucket = p_bucket AND s.partition_id = p_partition_id AND s.base_offset = p_base_offset;
    UPDATE queen.partitions p SET erased = p.erased + 1
    WHERE p.bucket = p_bucket AND p.partition_id = p_partition_id RETURNING p.queue_id INTO v_queue_id;
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = p_partition_id
        AND t.transaction_key = p_transaction_key AND t.message_offset = v_offset;
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    VALUES (p_bucket, 3, v_queue_id, 1, '');
    PERFORM queen.drop_dead_letters(p_bucket, p_partition_id, v_offset);
    PERFORM queen.drop_traces(p_bucket, ARRAY[p_partition_id], v_offset, NULL, 1000000);
    FOR c IN
        SELECT cu.* FROM queen.cursors cu
        WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_id AND cu.committed <= v_offset
        ORDER BY cu.group_name FOR NO KEY UPDATE
    LOOP
        IF queen.skip_offset(p_bucket, v_now, p_partition_id, c.group_name, v_offset) THEN
            RETURN NEXT c.group_name;
        END IF;
    END LOOP;
END
$$;

-- Remove the dead letters of a message. Returns how many there were.
CREATE OR REPLACE FUNCTION queen.drop_dead_letters(p_bucket integer, p_partition_id uuid, p_offset bigint)
RETURNS integer LANGUAGE sql AS $$
    WITH gone AS (
        DELETE FROM queen.dead_letters d
        WHERE d.bucket = p_bucket AND d.partition_id = p_partition_id AND d.message_offset = p_offset
        RETURNING d.queue_id, d.group_name
    ), counted AS (
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, 6, gone.queue_id, -1, gone.group_name FROM gone
    )
    SELECT count(*)::integer FROM gone
$$;

-- Remove one dead letter. True if it was there.
CREATE OR REPLACE FUNCTION queen.drop_dead_letter(p_bucket integer, p_partition_id uuid, p_offset bigint, p_group text)
RETURNS boolean LANGUAGE sql AS $$
    WITH gone AS (
        DELETE FROM queen.dead_letters d
        WHERE d.bucket = p_bucket AND d.partition_id = p_partition_id AND d.message_offset = p_offset
            AND d.group_name = p_group
        RETURNING d.queue_id
    ), counted AS (
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, 6, gone.queue_id, -1, p_group FROM gone
    )
    SELECT EXISTS (SELECT FROM gone)
$$;

-- One bounded step of removing the dead letters that failed before p_before, of all queues. Returns how many.
CREATE OR REPLACE FUNCTION queen.expire_dead_letters(p_bucket integer, p_before timestamptz, p_limit integer)
RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off
AS $$
DECLARE
    d record;
    v_count integer := 0;
BEGIN
    FOR d IN
        SELECT l.partition_id, l.message_offset, l.group_name FROM queen.dead_letters l
        WHERE l.bucket = p_bucket AND l.failed_at < p_before ORDER BY l.failed_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
        PERFORM queen.drop_dead_letter(p_bucket, d.partition_id, d.message_offset, d.group_name);
        v_count := v_count + 1;
    END LOOP;
    RETURN v_count;
END
$$;

-- Have a group skip an offset that it has not consumed; the caller holds the cursor's lock. In a lease it counts as
-- acked. True when the lease that held it is over by that.
CREATE OR REPLACE FUNCTION queen.skip_offset(
    p_bucket integer, p_now timestamptz, p_partition_id uuid, p_group text, p_offset bigint
) RETURNS boolean LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_one int8multirange := int8multirange(int8range(p_offset, p_offset + 1));
    v_over boolean;
BEGIN
    UPDATE queen.cursors c SET skips = coalesce(c.skips, '{}'::int8multirange) + v_one,
        acked = CASE WHEN c.lease_first <= p_offset AND p_offset < c.lease_end
            THEN coalesce(c.acked, '{}'::int8multirange) + v_one ELSE c.acked END
    WHERE c.bucket = p_bucket AND c.partition_id = p_partition_id AND c.group_name = p_group;
    UPDATE queen.cursors c SET ready_at = p_now, retry_count = 0, completed_lease_id = c.lease_id, lease_id = NULL,
        lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL, acked = NULL
    WHERE c.bucket = p_bucket AND c.partition_id = p_partition_id AND c.group_name = p_group
        AND c.lease_first <= p_offset AND p_offset < c.lease_end
        AND (SELECT sum(upper(r) - lower(r)) FROM unnest(c.acked) r) >= c.lease_end - c.lease_first
    RETURNING true INTO v_over;
    RETURN coalesce(v_over, false);
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
        erased = 0
    WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids);
    DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = ANY (v_ids);
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = ANY (v_ids);
    RETURN NEXT;
END
$$;

-- One bounded step of removing the dead letters of a queue, or of one partition, that failed before p_before.
CREATE OR REPLACE FUNCTION queen.clear_dead_letters_step(
    p_bucket integer, p_queue_id uuid, p_partition_id uuid, p_before timestamptz, p_limit integer
) RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    d record;
    v_count integer := 0;
    v_groups text[] := '{}';
BEGIN
    FOR d IN
        SELECT l.partition_id, l.message_offset, l.group_name FROM queen.dead_letters l
        WHERE l.bucket = p_bucket AND l.queue_id = p_queue_id AND l.failed_at <= p_before
            AND (p_partition_id IS NULL OR l.partition_id = p_partition_id)
        ORDER BY l.failed_at LIMIT p_limit FOR UPDATE
    LOOP
        DELETE FROM queen.dead_letters l
        WHERE l.bucket = p_bucket AND l.partition_id = d.partition_id AND l.message_offset = d.message_offset
            AND l.group_name = d.group_name;
        v_count := v_count + 1;
        v_groups := v_groups || d.group_name;
    END LOOP;
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 6, p_queue_id, -count(*), g FROM unnest(v_groups) g GROUP BY g;
    RETURN v_count;
END
$$;

-- Up to p_limit partitions of a queue, those with the oldest messages first and the empty ones last; with p_pending only
-- such as may have something for some group, those that have waited longest first.
CREATE OR REPLACE FUNCTION queen.list_partitions(p_bucket integer, p_queue_id uuid, p_pending boolean, p_limit integer)
RETURNS uuid[] LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
DECLARE
    v_groups text[] := ARRAY(SELECT g.name FROM queen.consumer_groups g WHERE g.queue_id = p_queue_id);
    v_ids uuid[] := '{}';
BEGIN
    IF NOT p_pending OR cardinality(v_groups) = 0 THEN
        RETURN ARRAY(
            SELECT p.partition_id FROM queen.partitions p
            WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id AND (NOT p_pending OR p.oldest_at IS NOT NULL)
            ORDER BY p.oldest_at LIMIT p_limit);
    END IF;
    FOR i IN 1 .. cardinality(v_groups) LOOP
        v_ids := v_ids || ARRAY(
            SELECT c.partition_id FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.queue_id = p_queue_id AND c.group_name = v_groups[i]
                AND c.ready_at IS NOT NULL
            ORDER BY c.ready_at LIMIT p_limit);
    END LOOP;
    RETURN ARRAY(SELECT DISTINCT id FROM unnest(v_ids) id LIMIT p_limit);
END
$$;

-- What is in partitions of a queue. `ahead` is what the slowest group has not consumed, `processing` what it has under a
-- live lease; dead letters are counted up to 1,000.
CREATE OR REPLACE FUNCTION queen.partition_states(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_queue_id uuid, p_ids uuid[]
) RETURNS TABLE (
    partition_id uuid, name text, created_at timestamptz, total bigint, ahead bigint, processing bigint,
    dead_letters bigint, consumed bigint, oldest_at timestamptz, newest_at timestamptz, active_at timestamptz
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    RETURN QUERY
        SELECT p.partition_id, p.name, p.created_at, p.next_offset - p.first_offset - p.erased,
            p.next_offset - greatest(slowest.committed, p.first_offset) - coalesce(slowest.skips, 0),
            coalesce(slowest.processing, 0), dead.letters, coalesce(slowest.committed, 0), p.oldest_at,
            CASE WHEN p.oldest_at IS NOT NULL THEN p.last_created_at END,
            greatest(p.last_created_at, slowest.consumed_at)
        FROM unnest(p_ids) WITH ORDINALITY AS given (partition_id, number)
        CROSS JOIN LATERAL (
            SELECT pa.* FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.partition_id = given.partition_id LIMIT 1
        ) p
        LEFT JOIN LATERAL (
            SELECT c.committed, c.consumed_at,
                CASE WHEN c.lease_expires_at > v_now AND c.lease_epoch = p_epoch
                    THEN c.lease_end - greatest(c.lease_first, c.committed) END AS processing,
                queen.skips_ahead(c.skips, c.committed) AS skips
            FROM queen.cursors c
            JOIN queen.consumer_groups g ON g.queue_id = p_queue_id AND g.name = c.group_name
            WHERE c.bucket = p_bucket AND c.partition_id = given.partition_id
            ORDER BY c.committed LIMIT 1
        ) slowest ON true
        CROSS JOIN LATERAL (
            SELECT count(*) AS letters FROM (
                SELECT FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = given.partition_id
                LIMIT 1000
            ) d
        ) dead
        ORDER BY given.number;
END
$$;
