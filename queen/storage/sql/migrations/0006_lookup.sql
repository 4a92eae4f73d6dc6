-- Reads of the hot paths: where an acked message lies, the segments of a batch, what has become ready.

-- Whatever a plan was made for, what is given leads (see queen.push).

-- Where messages lie. One row per partition that exists in a living queue (`kind` partition: names and the range of
-- keyed UUIDv7 ids), per key found (`kind` key), and per segment whose id range meets a probe (`kind` segment).
CREATE OR REPLACE FUNCTION queen.locate(
    p_bucket integer,
    p_partition_ids uuid[],
    p_probe_parts integer[], p_probe_min uuid[], p_probe_max uuid[], p_probe_bound uuid[],
    p_key_parts integer[], p_keys bytea[]
) RETURNS TABLE (
    kind text, part integer, queue_name text, partition_name text, first_offset bigint, low_id uuid, high_id uuid,
    key_number integer, message_offset bigint, message_count integer, id_prefix bigint, minted boolean,
    transaction_ids bytea, erased integer[]
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT 'partition', given.part::integer, q.name, p.name, p.first_offset, p.keyed_min, p.keyed_max,
            NULL::integer, NULL::bigint, NULL::integer, NULL::bigint, NULL::boolean, NULL::bytea, NULL::integer[]
        FROM unnest(p_partition_ids) WITH ORDINALITY AS given (partition_id, part)
        CROSS JOIN LATERAL (
            SELECT * FROM queen.partitions p
            WHERE p.bucket = p_bucket AND p.partition_id = given.partition_id LIMIT 1
        ) p
        CROSS JOIN LATERAL (SELECT q.name FROM queen.queues q WHERE q.queue_id = p.queue_id LIMIT 1) q;
    IF cardinality(p_keys) > 0 THEN
        RETURN QUERY
            SELECT 'key', k.part, NULL::text, NULL::text, NULL::bigint, NULL::uuid, NULL::uuid, k.number::integer,
                t.message_offset, NULL::integer, NULL::bigint, NULL::boolean, NULL::bytea, NULL::integer[]
            FROM unnest(p_key_parts, p_keys) WITH ORDINALITY AS k (part, transaction_key, number)
            CROSS JOIN LATERAL (
                SELECT t.message_offset FROM queen.transaction_ids t
                WHERE t.bucket = p_bucket AND t.partition_id = p_partition_ids[k.part]
                    AND t.transaction_key = k.transaction_key LIMIT 1
            ) t;
    END IF;
    IF cardinality(p_probe_parts) > 0 THEN
        RETURN QUERY
            SELECT 'segment', probe.part, NULL::text, NULL::text, NULL::bigint, NULL::uuid, NULL::uuid, NULL::integer,
                s.base_offset, s.message_count, s.id_prefix, s.minted, s.transaction_ids, s.erased
            FROM unnest(p_probe_parts, p_probe_min, p_probe_max, p_probe_bound)
                AS probe (part, least_id, greatest_id, bound)
            CROSS JOIN LATERAL (
                SELECT * FROM queen.segments s
                WHERE s.bucket = p_bucket AND s.partition_id = p_partition_ids[probe.part]
                    AND s.max_id >= probe.least_id AND s.max_id <= probe.bound AND s.min_id <= probe.greatest_id
                ORDER BY s.max_id OFFSET 0
            ) s;
    END IF;
END
$$;

-- Segments that hold offsets p_firsts <= o < p_ends of the partitions given, in order, until p_max_bytes of raw
-- envelopes or p_max_segments are reached (at least one segment); with p_each these count for every partition anew.
-- `part` is the place in the arrays, from 1.
CREATE OR REPLACE FUNCTION queen.read_segments(
    p_bucket integer, p_partition_ids uuid[], p_firsts bigint[], p_ends bigint[], p_max_bytes bigint,
    p_max_segments integer, p_each boolean
) RETURNS TABLE (
    part integer, base_offset bigint, message_count integer, created_at timestamptz, id_prefix bigint, minted boolean,
    codec smallint, raw_bytes integer, key_id text, body bytea, erased integer[]
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_bytes bigint := 0;
    v_segments integer := 0;
    s record;
BEGIN
    FOR i IN 1 .. cardinality(p_partition_ids) LOOP
        IF p_each THEN
            v_bytes := 0; v_segments := 0;
        END IF;
        EXIT WHEN v_bytes >= p_max_bytes OR v_segments >= p_max_segments;
        FOR s IN
            SELECT seg.* FROM queen.segments seg
            WHERE seg.bucket = p_bucket AND seg.partition_id = p_partition_ids[i] AND seg.base_offset < p_ends[i]
                AND seg.base_offset >= coalesce((
                    SELECT b.base_offset FROM queen.segments b
                    WHERE b.bucket = p_bucket AND b.partition_id = p_partition_ids[i] AND b.base_offset <= p_firsts[i]
                    ORDER BY b.base_offset DESC LIMIT 1), p_firsts[i])
            ORDER BY seg.base_offset LIMIT p_max_segments - v_segments
        LOOP
            CONTINUE WHEN s.base_offset + s.message_count <= p_firsts[i];
            part := i; base_offset := s.base_offset; message_count := s.message_count; created_at := s.created_at;
            id_prefix := s.id_prefix; minted := s.minted; codec := s.codec; raw_bytes := s.raw_bytes;
            key_id := s.key_id; body := s.body; erased := s.erased;
            RETURN NEXT;
            v_bytes := v_bytes + s.raw_bytes;
            v_segments := v_segments + 1;
            EXIT WHEN v_bytes >= p_max_bytes OR v_segments >= p_max_segments;
        END LOOP;
    END LOOP;
END
$$;

-- Which of the (queue, group) pairs have something that may be ready now. `place` counts from 1.
CREATE OR REPLACE FUNCTION queen.ready(p_bucket integer, p_now timestamptz, p_queue_ids uuid[], p_groups text[])
RETURNS TABLE (place integer, due_seconds double precision) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    RETURN QUERY
        SELECT given.place::integer, extract(epoch FROM c.ready_at - v_now)::double precision
        FROM unnest(p_queue_ids, p_groups) WITH ORDINALITY AS given (queue_id, group_name, place)
        CROSS JOIN LATERAL (
            SELECT cu.ready_at FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.queue_id = given.queue_id AND cu.group_name = given.group_name
                AND cu.ready_at IS NOT NULL
            ORDER BY cu.ready_at LIMIT 1
        ) c;
END
$$;
